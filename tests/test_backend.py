"""The choice of an implementation, and the launch of kernels."""

from threading import Thread

import torch

from kernels import backend


def test_launches_of_every_thread_are_observed():
    """On a GPU, those of a backward pass are autograd's."""
    seen = []
    kernel = {(1,): lambda: None, (2,): lambda: None}
    with backend.observe(lambda kernel, grid, args, constants: seen.append(grid)):
        thread = Thread(target=backend.launch, args=(kernel, (2,)))
        thread.start(), thread.join()
    backend.launch(kernel, (1,))
    assert seen == [(2,)]


def test_compiled_kernels_are_run_by_what_is_given():
    """Ops choose as on the GPU that is named; the torch path stays within reach."""
    x = torch.empty(2)
    seen = []
    with backend.run_compiled("sm_89", lambda *launch: seen.append(launch)):
        assert (backend.name(x), backend.target(x)) == ("triton", "sm_89")
        assert backend.multiprocessors(x) == 128
        backend.launch("kernel", (2,), x, ROWS=16)
        backend.launch("kernel", (0,), x, ROWS=16)
        with backend.use("torch"):
            assert backend.is_torch(x)
    assert seen == [("kernel", (2,), (x,), {"ROWS": 16})]
    assert backend.multiprocessors(x) == 1 and backend.is_torch(x)
