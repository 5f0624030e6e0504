"""A network's forward, recorded once as a CUDA graph and replayed: no launch costs the host anything then.

It pays where launches take longer than the kernels: few tokens, or a small network. Inputs are copied into
the graph's own tensors, so any request of the same size can use it. Not for a forward with a strategy inside.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from chitu_core.config import InferConfig
from chitu_core.distributed import ParallelMesh
from chitu_diffusion.memory_setting import DIT_ON_HOST
from chitu_diffusion.models.wan import TextCache, WanDiT
from chitu_diffusion.sequence import SequenceShard

logger = logging.getLogger(__name__)

Forward = Callable[..., Tensor]  # (network, latent, t, text, shard=) -> velocity

GRAPHS_KEPT = 4  # sizes and experts; each graph holds the memory of its activations
LAUNCH_BOUND_FLOPS = 1e12  # a block below this is over before the next one is launched: docs/speed.md
_WARM_UPS = 2  # forwards before recording: kernels are compiled and libraries take their workspace


def plain_forward(dit: WanDiT, latent: Tensor, t: Tensor, text: TextCache, *, shard: SequenceShard) -> Tensor:
    """The network's own forward."""
    velocity: Tensor = dit(latent, t, text, shard=shard)
    return velocity


class GraphedForward:
    """`plain_forward` from a graph for each network and size; for the largest sizes only if `is_required`."""

    def __init__(self, is_required: bool) -> None:
        self._is_required = is_required
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def __call__(
        self, dit: WanDiT, latent: Tensor, t: Tensor, text: TextCache, *, shard: SequenceShard
    ) -> Tensor:
        """See `plain_forward`."""
        tokens = latent[0, 0].numel() // (dit.config.patch_size[1] * dit.config.patch_size[2])
        if not (self._is_required or sum(dit.config.block_flops(tokens)) < LAUNCH_BOUND_FLOPS):
            return plain_forward(dit, latent, t, text, shard=shard)
        key = (dit, latent.shape, len(text.layers), text.layers[0][0].shape)
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS_KEPT:
                self._graphs.popitem(last=False)
            logger.info("infer.use_cuda_graph: recording a forward of %d tokens", tokens)
            self._graphs[key] = _Graph(dit, latent, t, text, shard)
        self._graphs.move_to_end(key)
        return self._graphs[key].replay(latent, t, text)


def choose_forward(infer: InferConfig, mesh: ParallelMesh, device: torch.device) -> Forward:
    """How transformers are called under `infer.use_cuda_graph`. Raises ValueError where `on` cannot apply."""
    mode, hindrance = infer.use_cuda_graph, None
    if device.type != "cuda":
        hindrance = "there is no GPU"
    elif mesh.replica is not None:
        hindrance = "several ranks share a video"
    elif infer.attn_schedule.is_set:
        hindrance = "infer.attn_schedule exchanges kernels between steps"
    elif infer.diffusion.level >= DIT_ON_HOST:
        hindrance = f"infer.diffusion.low_mem_level={infer.diffusion.level} moves the weights"
    if mode == "on" and hindrance is not None:
        raise ValueError(f"infer.use_cuda_graph=on: {hindrance}; set infer.use_cuda_graph=auto")
    return plain_forward if mode == "off" or hindrance else GraphedForward(is_required=mode == "on")


class _Graph:
    """One recorded forward with its input and output tensors."""

    def __init__(self, dit: WanDiT, latent: Tensor, t: Tensor, text: TextCache, shard: SequenceShard) -> None:
        layers = tuple((k.clone(), v.clone()) for k, v in text.layers)
        own_text = TextCache(layers)
        self._inputs = [latent.clone(), t.clone(), *_tensors(own_text)]
        own_latent, own_t, *_ = self._inputs
        side = torch.cuda.Stream(latent.device)
        side.wait_stream(torch.cuda.current_stream(latent.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                plain_forward(dit, own_latent, own_t, own_text, shard=shard)
        torch.cuda.current_stream(latent.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that writes another task's video goes on using CUDA meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = plain_forward(dit, own_latent, own_t, own_text, shard=shard)

    def replay(self, latent: Tensor, t: Tensor, text: TextCache) -> Tensor:
        torch._foreach_copy_(self._inputs, [latent, t, *_tensors(text)])
        self._graph.replay()
        return self._output.clone()


def _tensors(text: TextCache) -> Iterator[Tensor]:
    return (tensor for layer in text.layers for tensor in layer)
