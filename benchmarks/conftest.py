"""The option of benchmarks/test_rows.py."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--rows-with", default="eager", help="contenders beside ours, by comma (fastnn bench --list)")
