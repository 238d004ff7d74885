"""Asks a server through the KServe SDK's own clients and holds the answers against a bundle's golden logits.

Runs in the environment of make_venv.py: python kserve_check.py MODEL GOLDEN.npz HTTP GRPC, where HTTP and GRPC are
host:port. Prints one JSON object with the checks that passed; the first that fails raises. A process of its own: the
SDK registers the protocol's messages under the names that tritonclient takes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

ATOL = 1e-4  # eager against the runtime, as measured at export


def request(model: str, golden: Any, binary: bool) -> Any:
    array = golden["input"]
    kind = {"uint8": "UINT8", "float32": "FP32"}[str(array.dtype)]
    given = InferInput({"uint8": "image", "float32": "input"}[str(array.dtype)], list(array.shape), kind)
    given.set_data_from_numpy(array, binary_data=binary)
    return InferRequest(model, [given], request_id="a-7")


def check_answer(answer: Any, golden: Any) -> None:
    assert answer.id == "a-7"
    np.testing.assert_allclose(answer.outputs[0].as_numpy().reshape(1, -1), golden["logits"], rtol=0, atol=ATOL)


async def over_http(address: str, model: str, golden: Any) -> list[str]:
    url = f"http://{address}"
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=60)) as client:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, model)
        for binary in (True, False):
            check_answer(await client.infer(url, request(model, golden, binary), model_name=model), golden)
    return ["http health", "http binary", "http json"]


async def over_grpc(address: str, model: str, golden: Any) -> list[str]:
    async with InferenceGRPCClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(model)
        assert not await client.is_model_ready("no-such-model")
        check_answer(await client.infer(request(model, golden, True)), golden)
    return ["grpc health", "grpc raw"]


async def main() -> None:
    model, path, over_rest, over_rpc = sys.argv[1:]
    golden = np.load(path)
    passed = await over_http(over_rest, model, golden) + await over_grpc(over_rpc, model, golden)
    print(json.dumps({"passed": passed}))


if __name__ == "__main__":
    asyncio.run(main())
