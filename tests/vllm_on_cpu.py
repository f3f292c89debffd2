"""A plugin of pytest for `make test-vllm`: what vLLM must find before it is imported, to run on a CPU.

``STORM_VLLM_RUNNER=2`` chooses its second model runner, whose kernels need Triton. No wheel of that has a backend for
CPUs; interpreted kernels need none, only a driver that says it is there.
"""

import os
import types

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the model can be looked into
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
if os.environ.get("STORM_VLLM_RUNNER") == "2":
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]
