"""Datasets on disk: how they are read, checked, described and written."""
