"""Adapters, one file a framework. Nothing here is imported until it is asked for."""
