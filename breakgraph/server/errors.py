"""Every refusal has one shape, OpenAI's: ``{"error": {"message", "type", "param", "code"}}``.

A message is a sentence that the client can act on; what went wrong inside the server is logged
there and never sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from breakgraph.engine.errors import EngineDeadError, QueueFullError, RequestFailedError

RETRY_SECONDS = 1


class ApiError(Exception):
    """A request that is answered with an error; ``param`` names the field that is at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": f"{RETRY_SECONDS}"}}
        return JSONResponse(self.body, self.status, headers.get(self.status))


@contextmanager
def refusals(param: str | None = None) -> Iterator[None]:
    """Around a call of the engine: what it refuses becomes an answer, with its own words."""
    try:
        yield
    except QueueFullError as error:
        raise ApiError(503, str(error), code="queue_full") from error
    except EngineDeadError as error:
        raise ApiError(503, str(error), code="engine_dead") from error
    except RequestFailedError as error:
        raise ApiError(500, str(error)) from error
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


def add_handlers(app: FastAPI) -> None:
    """Answer whatever a handler raises in the one shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is no JSON: {first['ctx']['error']}").response()
        if not place and first["type"] in ("missing", "model_attributes_type", "dict_type"):
            what = "the body must be a JSON object, sent with 'Content-Type: application/json'"
            return ApiError(400, what).response()
        field = ".".join(place)
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{field or 'body'}: {message}", param=field or None).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, what).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        message = "this request failed inside the server, which logged why; others are not affected"
        return ApiError(500, message).response()
