"""A CUDA device for machines that have none: torch has one within `with pretend.cuda() as log:`, and the CPU computes.

A DeviceTensor shares the memory of a CPU tensor and says that it is on cuda:0. What CUDA refuses is refused with its
message: operations on tensors of both devices, a generator of the other device, .numpy(). `log` counts how often every
line of the project makes the host wait for the device, and the bytes that the device holds. Not shown: speed, rounding,
and what CUDA's own kernels and its allocator do.
"""

import collections
import contextlib
import sys
import types
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten, Tag = torch.ops.aten, torch.Tag
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
TAKES_A_CPU_SCALAR = {*INDEXING, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
WITHOUT_CPU_KERNEL = {aten.mm.dtype: aten.mm.default, aten.bmm.dtype: aten.bmm.default}  # those with an out_dtype
NOT_IN_FLOAT32 = """addcdiv addcmul addmv addr atan2 bilinear chain_matmul _convolution convolution cross dot einsum
index_put linalg_multi_dot mv scatter_add tensordot vdot""".split()  # of what only CUDA's autocast has a rule for


class Log:
    """What the device was asked for."""

    def __init__(self):
        self.initialized = False  # whether anything touched the device
        self.waits = collections.Counter()  # (what the host waited for, "file.py:line")
        self.live = self.peak = 0  # bytes
        self.storages = weakref.WeakValueDictionary()  # address -> _Bytes
        self.in_device_call = False  # what torch allocates for itself in a call on device tensors is on the device too

    def touch(self, value=None):
        self.initialized = True
        return value

    def wait(self, what: str) -> None:
        """Count a wait, at the innermost line of the project that is executing."""
        frame, line = sys._getframe(1), "?"
        while frame and line == "?":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts and str(path) != __file__:
                line = f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back
        self.waits[what, line] += 1


class _Bytes:
    """The size of a storage, which counts while a tensor on the device has it."""

    def __init__(self, log: Log, size: int):
        self.log, self.size = log, size
        log.live += size
        log.peak = max(log.peak, log.live)

    def __del__(self):
        self.log.live -= self.size


def on_cuda(x) -> bool:
    """Whether a tensor is on the device, or a device is the device."""
    return isinstance(x, DeviceTensor) or (isinstance(x, (str, torch.device)) and str(x).startswith("cuda"))


def map_nested(function, x):
    """x with the function applied to everything in its lists, tuples and dictionaries."""
    if isinstance(x, (list, tuple)):
        return (list if isinstance(x, list) else tuple)(map_nested(function, y) for y in x)
    if isinstance(x, dict):
        return {name: map_nested(function, y) for name, y in x.items()}
    return function(x)


def tensors_in(*nested) -> list[torch.Tensor]:
    tensors = []
    map_nested(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, nested)
    return tensors


class DeviceTensor(torch.Tensor):
    events = Log()  # not `log`, which is an operation
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)
    data = property(lambda self: self.detach())  # cannot be set: torch would change this tensor, not the one inside
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        out, log = torch.Tensor._make_subclass(cls, inner), cls.events.touch(cls.events)
        storage = inner.untyped_storage()
        out.inner, out.bytes = inner, log.storages.get(storage._cdata) or _Bytes(log, storage.nbytes())
        log.storages[storage._cdata] = out.bytes
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def to(self, *args, copy: bool = False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        to_host = device is not None and not on_cuda(device)
        moved = super().to(dtype or self.dtype, copy=copy and not to_host)
        return _CopyToHost.apply(moved, non_blocking) if to_host else moved

    def cpu(self):
        return self.to(CPU)

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA} | options)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to the host first")

    __array__ = numpy

    def __repr__(self, **_):
        return f"{self.inner!r} on {CUDA}"

    def __reduce_ex__(self, protocol):  # without its device: the project reads files with map_location="cpu"
        return self.cpu().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = DeviceTensor(self.inner.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]


class _CopyToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: DeviceTensor, non_blocking: bool) -> torch.Tensor:
        if not non_blocking:
            x.events.wait("copy to the host")
        return x.inner.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[DeviceTensor, None]:
        return DeviceTensor(gradient.clone()), None


def execute(func, args: tuple, kwargs: dict):
    """Do an operation on the CPU tensors inside device tensors, if CUDA would do it."""
    log, device = DeviceTensor.events, kwargs.get("device")
    inputs = tensors_in(args, kwargs)
    device_inputs = {id(x.inner): x for x in inputs if on_cuda(x)}  # one of them is what an in-place operation returns
    to_cuda = bool(device_inputs) or on_cuda(device) or (device is not None and log.in_device_call)
    if func is aten._to_copy.default:
        if to_cuda and not device_inputs and inputs[0].numel() and not kwargs.get("non_blocking"):
            log.wait("copy to the device")
    elif func is aten.copy_.default:
        to_cuda = on_cuda(args[0])
        is_number = to_cuda and not args[1].dim()  # x[0] = 1, which CUDA fills in
        if on_cuda(args[1]) != to_cuda and not is_number and not any(args[2:]):
            log.wait("copy to the device" if to_cuda else "copy to the host")
    elif device_inputs:
        check(func, args, inputs)
        depends_on_values = {Tag.data_dependent_output, Tag.dynamic_output_shape} & set(func.tags)
        if depends_on_values and func not in INDEXING and kwargs.get("output_size") is None:
            log.wait(func.name().removeprefix("aten::").replace("_local_scalar_dense", "item"))
    if func in WITHOUT_CPU_KERNEL:
        args, func = tuple(x.to(args[-1]) for x in args[:-1]), WITHOUT_CPU_KERNEL[func]
    draws = to_cuda and Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None

    def unwrapped(x):
        return x.inner if isinstance(x, DeviceTensor) else CPU if on_cuda(x) else x

    def wrapped(x):
        if not (to_cuda and isinstance(x, torch.Tensor)):
            return x
        return device_inputs[id(x)] if id(x) in device_inputs else DeviceTensor(x)

    with default_generator.in_place_of_the_cpus() if draws else contextlib.nullcontext():
        return map_nested(wrapped, func(*map_nested(unwrapped, args), **map_nested(unwrapped, kwargs)))


def check(func, args: tuple, inputs: list[torch.Tensor]) -> None:
    """Refuse what CUDA refuses, and count the waits for an index."""
    if Tag.inplace_view in func.tags:
        raise NotImplementedError(f"the pretend device cannot do {func}, which gives a tensor another shape in place")
    indices = [x for x in args[1] if x is not None] if func in INDEXING else []
    for index in indices:
        if not on_cuda(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if index.dtype in (torch.bool, torch.uint8) or not on_cuda(index):
            DeviceTensor.events.wait("boolean index" if on_cuda(index) else "copy to the device")
    scalars_too = func in TAKES_A_CPU_SCALAR or Tag.pointwise in func.tags
    for x in inputs:
        written = func._schema.is_mutable and x is args[0]
        if not on_cuda(x) and not any(x is index for index in indices) and (x.dim() or written or not scalars_too):
            raise RuntimeError(f"Expected all tensors to be on the same device, but got cuda:0 and cpu ({func})")


class _Operations(TorchDispatchMode):
    """Sees the operations that make a device tensor from none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Does in place of torch what it needs a driver for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))

        def with_index(x):
            return CUDA if isinstance(x, (str, torch.device)) and on_cuda(x) else x

        args, kwargs = [with_index(x) for x in args], {name: with_index(x) for name, x in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, [*args[:1], CUDA]
        if func is torch.Tensor.to and any(isinstance(x, DeviceTensor) for x in args[1:2]):
            args[1:2] = CUDA, args[1].dtype
        generator, device = kwargs.get("generator"), kwargs.get("device")
        uses_device = on_cuda(device) or any(map(on_cuda, tensors_in(args)))
        if generator is not None and generator.device.type != (kind := "cuda" if uses_device else "cpu"):
            raise RuntimeError(f"Expected a '{kind}' device type for generator but found '{generator.device.type}'")
        log = DeviceTensor.events
        before, log.in_device_call = log.in_device_call, uses_device and device is None
        try:
            return func(*args, **kwargs)
        finally:
            log.in_device_call = before


class Generator(torch.Generator):
    """A generator of either device; that of CUDA draws as the CPU's, and its states have another length."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.on, self.padding = torch.device(device), torch.zeros(16 * on_cuda(device), dtype=torch.uint8)

    device = property(lambda self: CUDA if on_cuda(self.on) else self.on)

    def get_state(self) -> torch.Tensor:
        return torch.cat([super().get_state(), self.padding])

    def set_state(self, state: torch.Tensor):
        if on_cuda(state):
            raise TypeError("RNG state must be a torch.ByteTensor")
        if len(state) != len(self.get_state()):
            raise RuntimeError("RNG state is wrong size")
        return super().set_state(state[: len(super().get_state())].clone())

    @contextlib.contextmanager
    def in_place_of_the_cpus(self):
        """Operations without a generator draw from this one."""
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(super().get_state())
        yield
        super().set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


default_generator = Generator("cuda")


def add_float32_operations(library: torch.library.Library) -> None:
    """Make the CPU's autocast keep in float32 what only CUDA's does; in low precision the two do nearly the same."""

    def wide(x):
        return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x

    def in_float32(operation):
        def call(*args, **kwargs):
            with torch.autocast("cpu", enabled=False):
                return operation(*map_nested(wide, args), **map_nested(wide, kwargs))

        return call

    has_rule = torch._C._dispatch_has_kernel_for_dispatch_key
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, name, overload = *full_name.split("::"), full_name.partition(".")[2] or "default"
        only_cuda = has_rule(full_name, "AutocastCUDA") and not has_rule(full_name, "AutocastCPU")
        if namespace == "aten" and only_cuda and name not in NOT_IN_FLOAT32:
            library.impl(name, in_float32(getattr(getattr(aten, name.partition(".")[0]), overload)), "AutocastCPU")


def move(module: nn.Module, fn, recurse: bool = True, apply=nn.Module._apply) -> nn.Module:
    """nn.Module._apply that keeps a parameter the same object when it moves, so that what is tied stays tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return apply(module, fn, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@contextlib.contextmanager
def cuda():
    """Give torch a CUDA device until the end of the block; yields its Log."""
    DeviceTensor.events = log = Log()
    autocast, enabled, dtype_of = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    group, lifts_only_cpu = torch._C._group_tensors_by_device_and_dtype, torch._C._only_lift_cpu_tensors()
    properties = types.SimpleNamespace(name="a pretend CUDA device", total_memory=80 * 2**30, major=9, minor=0)
    stand_ins = {"cuda": "cpu"}  # whose autocast it is

    def start_autocast(self, kind, *args, **kwargs):
        autocast(self, stand_ins.get(kind, kind), *args, **kwargs)

    def grouped(lists, *args):  # torch is right about everything but the device
        return {(x[0][0][0].device, dtype): x for (_, dtype), x in group(lists, *args).items()}

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.multiple(
                torch.cuda,
                _lazy_init=log.touch,
                is_available=lambda: True,
                is_initialized=lambda: log.initialized,
                device_count=lambda: 1,
                is_bf16_supported=lambda *_, **__: True,
                get_device_name=lambda *_: log.touch(properties.name),
                get_device_properties=lambda *_: log.touch(properties),
                manual_seed_all=default_generator.manual_seed,
                get_rng_state=lambda *_: log.touch(default_generator.get_state()),
                set_rng_state=lambda state, *_: log.touch(default_generator.set_state(state)),
                synchronize=lambda *_: log.wait("synchronize"),
                max_memory_allocated=lambda *_: log.peak,
                reset_peak_memory_stats=lambda *_: setattr(log, "peak", log.live),
            ),
            mock.patch.object(torch, "Generator", Generator),
            mock.patch.object(torch, "is_autocast_enabled", lambda kind="cuda": enabled(stand_ins.get(kind, kind))),
            mock.patch.object(torch, "get_autocast_dtype", lambda kind: dtype_of(stand_ins.get(kind, kind))),
            mock.patch.object(torch.autocast, "__init__", start_autocast),
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
            mock.patch.object(nn.Module, "_apply", move),
        ):
            stack.enter_context(patch)
        add_float32_operations(stack.enter_context(torch.library._scoped_library("aten", "IMPL")))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then copies where it is seen
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_only_cpu)
        stack.enter_context(_Operations())
        stack.enter_context(_Calls())
        yield log
