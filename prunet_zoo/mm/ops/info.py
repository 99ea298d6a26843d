"""What mmcv reports about its build."""


def get_compiler_version() -> str:
    """No compiler took part."""
    return "not compiled"


def get_compiling_cuda_version() -> str:
    """No CUDA compiler took part."""
    return "not compiled"
