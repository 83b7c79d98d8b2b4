"""A second device on a machine that has one: the tensors of `other` refuse to meet those of the CPU

Each of them holds an ordinary tensor, and every operation is done on those. PyTorch itself believes the device: its backend for
devices that are written in Python (2.9 and later) gives it a name. What a GPU would refuse is refused: an operation with tensors of
both devices, unless the one of the CPU is a single number or an index, and NumPy. What makes a GPU wait is counted: `item`, copies
to the CPU, `nonzero`.
"""
from collections import Counter
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = 'other'
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default, aten.set_.source_Tensor}
INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
WAITS = {
    aten._local_scalar_dense.default: 'item',
    aten.nonzero.default: 'nonzero',
    aten.masked_select.default: 'masked_select',
    aten.equal.default: 'equal',
}


class TwoDevices(RuntimeError):
    "Tensors of two devices in one operation"


class Other(torch.Tensor):
    "A tensor that lives elsewhere"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner): return torch.Tensor._make_subclass(cls, inner, inner.requires_grad, dispatch_device=True)

    def __init__(self, inner): self.inner = inner

    def tolist(self): return self.inner.tolist() # a GPU copies it; PyTorch does not for tensors that are written in Python

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default: return torch.device(NAME, 0)
        return run(func, args, kwargs or {}, None)


def plain(x): return x.inner if isinstance(x, Other) else x


def run(func, args, kwargs, counts):
    "Do an operation where its tensors live"
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, Other) for t in tensors)
    device = kwargs.get('device')
    wanted = None if device is None else torch.device(device).type
    if there and func not in COPIES:
        here = [t for t in tensors if not isinstance(t, Other) and t.dim() > 0]
        if func in INDEXED: here = [t for t in here if t is args[0] or len(args) > 2 and t is args[2]]
        if here: raise TwoDevices(f'{func} with a tensor of {NAME} and one of the CPU, of shape {tuple(here[0].shape)}')
    if counts is not None and there:
        if func in WAITS: counts[WAITS[func]] += 1
        if func is aten._to_copy.default and wanted == 'cpu': counts['to the CPU'] += 1
    if wanted == NAME: kwargs = kwargs | {'device': torch.device('cpu')}
    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    if func is aten.copy_.default or func._schema.is_mutable and args and isinstance(args[0], torch.Tensor) and out is plain(args[0]):
        return args[0]
    stays = there if wanted is None else wanted == NAME
    return tree_map(lambda t: Other(t) if isinstance(t, torch.Tensor) and not isinstance(t, Other) else t, out) if stays else out


class Elsewhere(TorchDispatchMode):
    "A context in which the device `other` is there"
    def __init__(self):
        super().__init__()
        set_up()
        self.counts = Counter()

    def __enter__(self):
        self.lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True) # torch.tensor(…, device=…) makes a tensor here, then moves it: seen by a mode
        self.overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True) # a parameter that moves is another one
        return super().__enter__()

    def __exit__(self, *a):
        torch._C._set_only_lift_cpu_tensors(self.lift)
        torch.__future__.set_overwrite_module_params_on_conversion(self.overwrite)
        return super().__exit__(*a)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default: return torch.device(NAME, 0)
        return run(func, args, kwargs or {}, self.counts)


@lru_cache(maxsize=1)
def set_up():
    "Tell PyTorch that there is such a device"
    from torch.utils import backend_registration as registration
    class Module(registration._DummyBackendModule):
        "With what gradient checkpointing asks for"
        def get_amp_supported_dtype(self): return [torch.bfloat16]
        def is_initialized(self): return True
        def get_rng_state(self, device=None): return torch.random.get_rng_state()
        def set_rng_state(self, state, device=None): torch.random.set_rng_state(state)
    registration._setup_privateuseone_for_python_backend(NAME, Module())
