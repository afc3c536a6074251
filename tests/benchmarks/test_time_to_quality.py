"""The benchmark of time to quality: costs are counted right, and on real tables our search beats random and TPE."""

from __future__ import annotations
