"""A limit on the size of files, which stands for a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Within this context, writing more than `size` bytes to a file fails with "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
