"""Reports of finished runs."""

from gsa_platform.report.summary import render_summary

__all__ = ["render_summary"]
