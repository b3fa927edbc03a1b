"""Configuration classes of transformers, without the docstrings that it generates for them.

To write the docstring of a configuration class, ``auto_docstring`` imports the table of model
classes, and with it, in transformers 5.17, text generation: 2000 modules, among them scikit-learn,
pandas, sympy and torch's compiler. That took 4 of the 14 s of a start on an H200, for a text that
nothing reads. Every other class is documented as always, and so is a configuration class that is
imported outside of the context.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MODULE, _FUNCTION = "transformers.utils.auto_docstring", "auto_class_docstring"
_lock = threading.RLock()


@contextmanager
def undocumented_configs() -> Iterator[None]:
    """A context in which imports generate no docstrings of configuration classes.

    Threads take turns. Where transformers has no such function, it changes nothing.
    """
    with _lock:
        try:
            module = importlib.import_module(_MODULE)  # an import statement gives the decorator
            plain = getattr(module, _FUNCTION)
        except (ImportError, AttributeError):
            yield
            return

        def document(cls: type, *args: Any, **kwargs: Any) -> Any:
            configures = any(base.__name__ == "PreTrainedConfig" for base in cls.__mro__)
            return cls if configures else plain(cls, *args, **kwargs)

        setattr(module, _FUNCTION, document)
        try:
            yield
        finally:
            setattr(module, _FUNCTION, plain)
