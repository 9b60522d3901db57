"""Named caches: lookup, building, quota, expiry, transfer, verification."""
