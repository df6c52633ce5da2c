"""Compile for a GPU that is not there: launchers are called as ever, and stop short of the launch.

What a launcher compiles depends on its arguments alone: dtypes, what divides addresses and strides,
constants, and the launch table of the GPU. CPU tensors of the same shapes give the same kernels,
under the same keys in Triton's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lora_kernels import launch


@contextlib.contextmanager
def absent_gpu(capability: int) -> Iterator[None]:
    """Inside the block, take CPU tensors for tensors on a GPU, compile, and launch nothing.

    Outputs hold whatever was in their memory. Kernels must not be interpreted (TRITON_INTERPRET).

    Args:
        capability: of the GPU, 80 or 90; names the launch tables too.

    Yields:
        Nothing.
    """
    fake = mock.Mock()
    fake.get_current_target.return_value = GPUTarget("cuda", capability, 32)
    # compiled kernels are kept by device
    fake.get_current_device.return_value = capability
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(kernel, *args, warmup=True, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", fake))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(
            mock.patch.object(launch, "_table_name", lambda device: f"sm_{capability}")
        )
        yield
