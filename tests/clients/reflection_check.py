"""Asks a gRPC server for its own description and calls it by that alone, as grpcurl does.

Runs in the environment of make_venv.py: python reflection_check.py MODEL GOLDEN.npz GRPC, where GRPC is host:port. No
proto file and no generated message is read. Prints one JSON object with what it found; a check that fails raises.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

ATOL = 1e-4  # eager against the runtime, as measured at export


def main() -> None:
    model, path, address = sys.argv[1:]
    golden = np.load(path)
    with grpc.insecure_channel(address) as channel:
        described = ProtoReflectionDescriptorDatabase(channel)
        services = sorted(described.get_services())
        service = descriptor_pool.DescriptorPool(described).FindServiceByName("inference.GRPCInferenceService")

        def call(method: str, text: dict[str, Any]) -> Any:
            found = service.methods_by_name[method]
            given, answer = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
            stub = channel.unary_unary(
                f"/{service.full_name}/{method}",
                request_serializer=given.SerializeToString,
                response_deserializer=answer.FromString,
            )
            return stub(json_format.ParseDict(text, given()), timeout=60)

        assert call("ServerLive", {}).live
        tensor = json_format.MessageToDict(call("ModelMetadata", {"name": model}))["inputs"][0]
        tensor["contents"] = {"uintContents": golden["input"].reshape(-1).tolist()}
        tensor["shape"] = list(golden["input"].shape)
        answer = call("ModelInfer", {"modelName": model, "inputs": [tensor]})
        got = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(golden["logits"].shape)
        np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=ATOL)
    print(json.dumps({"services": services, "methods": sorted(service.methods_by_name)}))


if __name__ == "__main__":
    main()
