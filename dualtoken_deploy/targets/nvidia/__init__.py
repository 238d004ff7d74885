"""What an NVIDIA device needs for TensorRT: CUDA memory and streams, the builder, the inspector, the preflight.

Nothing here imports torch. In these modules `trt` is always the tensorrt module, and what comes out of it is annotated
with its class (`tensorrt.Builder`), so that a test can hold every use against the recorded API of real versions.
"""
