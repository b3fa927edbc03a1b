"""Accuracy on word problems: what was asked, what counts as right, and whether graphs change it.

A figure is comparable only under its protocol: prompts, stops, decoding and grading are fixed by a
protocol's name, and change only with it.
"""
