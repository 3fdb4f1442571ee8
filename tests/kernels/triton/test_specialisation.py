"""What a serving batch changes must not make Triton compile again: a compilation takes seconds, on a request's path."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton kernels need triton")

CODE = """
import json, torch
from mxn_kernels import ops
from mxn_kernels.aot import source_of
from mxn_kernels.kv_cache import KVCache
from mxn_kernels.shared_prefix import PrefixGroup, SharedPrefix
from mxn_kernels.target import Target
from mxn_kernels.testing.launches import index, meta
from mxn_kernels.triton.launch import record_launches

target = Target.named("sm_90")
cache = KVCache.allocate(4096, block_size=16, num_kv_heads=2, key_dim=64, device="meta")
forms = {}
for count in (1, 2, 3, 15, 16, 17, 33):
    for width in (1, 7, 16):
        for skipped in (0, 1, 3):
            part = slice(skipped, skipped + count)
            table, contexts, ids = index(count + 3, width)[part], index(count + 3)[part], index(count + 3)[part]
            query, new = meta(count, 6, 64), meta(count, 2, 64)
            group = PrefixGroup(1, tuple(range(count)))
            prefix = SharedPrefix.of([group], num_seqs=count, block_size=16, device="meta")
            rule = {"scaling": 0.1, "return_lse": True, "target": target}
            with record_launches() as launches:
                ops.write_kv(new, new, cache, ids, target=target)
                for splits in (1, 2, 8):
                    ops.paged_decode(query, cache, table, contexts, num_splits=splits, **rule)
                ops.ragged_prefill(query, cache, table, index(count + 1), contexts, **rule)
                ops.shared_prefix_decode(query, cache, table, contexts, prefix, num_splits=2, **rule)
                ops.rms_norm(meta(count, 128), meta(128), 1e-6, target=target)
                ops.move_blocks(cache.blocks, cache.blocks, index(count), ids, target=target)
            for launch in launches:
                source = source_of(launch)
                constants = {str(k): str(v) for k, v in source.constants.items()}
                form = json.dumps([source.signature, constants, str(sorted(source.attrs.items()))], sort_keys=True)
                forms.setdefault(launch.name, set()).add(form)
print(json.dumps({name: len(found) for name, found in forms.items()}))
"""


def test_batches_of_all_sizes_use_the_same_compiled_kernels() -> None:
    """Decode has a form for one split, which writes the result, and one for more; all others have one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    forms = json.loads(done.stdout)
    assert forms.pop("paged_decode_kernel") == 3, "one split; more; and the tails of shared prefixes"
    assert set(forms.values()) == {1}, forms
