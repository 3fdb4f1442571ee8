"""The store: from a model's name to checked files on this disk. Fetched once, converted once, never half-written."""

from mxn.store.fetch import CachedModel, fetch, list_cached, remove
from mxn.store.gather import Progress
from mxn.store.resolve import resolve
from mxn.store.spec import spec_from_config

__all__ = ["CachedModel", "Progress", "fetch", "list_cached", "remove", "resolve", "spec_from_config"]
