"""The Acme X1, a simulated chip, as a backend of mxn. It computes Llama and Qwen2 models for real, in numpy."""

from mxn.backends.base import Backend, Capabilities, MemoryEstimate, Probe, Support
from mxn.core.chip import Chip
from mxn.core.quantity import Provenance, Quantity
from mxn_acme import chip as x1


class AcmeBackend(Backend):
    name = "acme"
    api_version = 1

    def probe(self):
        return Probe(state="active", reason="one Acme X1, simulated")

    def chips(self):
        return [Chip(uid="acme-x1-0", kind=None, name="Acme X1", vendor="Acme", memory_bytes=x1.MEMORY_BYTES, cores=1)]

    def capabilities(self, chip):
        return Capabilities(
            kv="paged",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=False,
            can_share_chip=True,
            quantisations=("fp32",),
        )

    def supports(self, model, chip):
        if model.architecture not in ("llama", "qwen2"):
            return Support(verdict="no", reasons=(f"it computes llama and qwen2, not {model.architecture}",))
        return Support(verdict="yes", quantisations=("fp32",), max_context=model.max_context)

    def estimate(self, model, settings, chip):
        kv_bytes = num_blocks(model, settings) * settings.block_size * model.kv_bytes_per_token(4)
        kv_cache = Quantity(value=kv_bytes, unit="B", provenance=Provenance.ESTIMATED, source="whole blocks, 4 bytes")
        unknown = Quantity.unavailable("B", "the X1's driver does not say")
        return MemoryEstimate(weights=unknown, kv_cache=kv_cache, activations=unknown, overhead=unknown)

    def power(self, chip):
        return x1.X1PowerReader("simulated: 2 W idle, 15 W busy, counted at the end of each step")

    def memory_used(self, chip, pid):
        used = x1.memory_used(pid)
        return Quantity(value=used, unit="B", provenance=Provenance.SIMULATED, source="the X1's ledger")

    def load(self, model, settings, chips, progress):
        from mxn_acme.executor import AcmeExecutor

        return AcmeExecutor(model, settings, num_blocks(model.spec, settings), progress)


def num_blocks(model, settings):
    token_bytes = model.kv_bytes_per_token(4)
    budget = settings.kv_bytes or settings.auto_kv_tokens(model.max_context) * token_bytes
    return max(1, int(budget // (token_bytes * settings.block_size)))
