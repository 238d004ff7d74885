"""`dualtoken serve`: bundles behind the Open Inference Protocol (V2), over HTTP and gRPC.

http.py, grpc.py ──> handler.py ──> repository.py ──> batcher.py ──> pool.py ──> worker.py (a process with the runner)
      protocol.py (tensors on the wire)      admission.py (what may come in)      server.py (start, signals, drain)

Nothing here imports torch. The transports alone know status codes; everything below raises serve.errors.
"""
