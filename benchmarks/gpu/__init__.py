"""The check of the GPU backends: `bash benchmarks/gpu_check.sh --minutes N`; see ../README.md."""
