"""The door of all launches."""

from threading import Thread

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
