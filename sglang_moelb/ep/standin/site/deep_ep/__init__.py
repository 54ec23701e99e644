"""What SGLang imports as `deep_ep` in a server on CPU: the stand-in of `sglang_moelb`."""

from sglang_moelb.ep.standin.deep_ep_buffer import Config, EventHandle, EventOverlap, topk_idx_t
from sglang_moelb.ep.standin.deep_ep_low_latency import LowLatencyBuffer as Buffer

__version__ = "2.1.0+moelb.standin"
__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
