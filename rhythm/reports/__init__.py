"""Builds reports: a training run's page, and several runs compared as HTML, Markdown, CSV and figures."""
