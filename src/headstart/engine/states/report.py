"""Tells what a state store holds and has done."""

from __future__ import annotations

from headstart.engine.states.store import StateStore
from headstart.protocol import StoreReport


def report_of(store: StateStore) -> StoreReport:
    blocks, disk = list(store.blocks()), store.disk
    return StoreReport(
        memory_bytes=store.memory_bytes,
        memory_tokens=sum(len(block.tokens) for block in blocks if block.in_memory),
        disk_bytes=disk.n_bytes if disk else 0,
        disk_tokens=sum(len(block.tokens) for block in blocks if block.file),
        chains=sum(not block.children for block in blocks),
        evictions=store.evictions,
        parked=store.parked,
        park_ms=store.park_ms,
        given_up=store.given_up,
        verify_failures=store.verify_failures,
        write_failures=disk.failures if disk else 0,
    )
