"""Asks a server through NVIDIA's own clients and holds the answers against a bundle's golden logits.

Runs in the environment of make_venv.py: python triton_check.py MODEL GOLDEN.npz HTTP [GRPC], where HTTP and GRPC are
host:port. Prints one JSON object with the checks that passed; the first that fails raises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

ATOL = 1e-4  # eager against the runtime, as measured at export


def check_metadata(client: Any, model: str, as_json: dict[str, Any]) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    server = client.get_server_metadata(**as_json)
    assert server["name"] == "dualtoken"
    assert "binary_tensor_data" in server["extensions"]
    metadata = client.get_model_metadata(model, **as_json)
    assert (metadata["name"], metadata["outputs"][0]["datatype"]) == (model, "FP32")


def check_unknown(client: Any, inputs: list[Any]) -> None:
    check_refused(lambda: client.infer("no-such-model", inputs), ("404", "StatusCode.NOT_FOUND"), "unknown model")
    assert not client.is_model_ready("no-such-model")


def check_logits(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


def over_http(address: str, model: str, golden: Any) -> list[str]:
    with tritonclient.http.InferenceServerClient(address, connection_timeout=30, network_timeout=60) as client:
        check_metadata(client, model, {})
        tensor = client.get_model_metadata(model)["inputs"][0]
        for binary in (True, False):
            given = tritonclient.http.InferInput(tensor["name"], list(golden["input"].shape), tensor["datatype"])
            given.set_data_from_numpy(golden["input"], binary_data=binary)
            for outputs in (None, [tritonclient.http.InferRequestedOutput("logits", binary_data=binary)]):
                answer = client.infer(model, [given], outputs=outputs, request_id="a-7")
                assert answer.get_response()["id"] == "a-7"
                check_logits(answer.as_numpy("logits"), golden["logits"])
            top = [tritonclient.http.InferRequestedOutput("logits", binary_data=binary, class_count=1)]
            text = client.infer(model, [given], outputs=top).as_numpy("logits")[0, 0]
            index = int((text.decode() if isinstance(text, bytes) else text).split(":")[1])
            assert index == int(golden["logits"][0].argmax())
        pending = [client.async_infer(model, [given]) for _ in range(4)]
        for one in pending:
            check_logits(one.get_result().as_numpy("logits"), golden["logits"])
        check_unknown(client, [given])
        given = tritonclient.http.InferInput(tensor["name"], [1, 2, 3], tensor["datatype"])
        given.set_data_from_numpy(golden["input"].reshape(-1)[:6].reshape(1, 2, 3))
        check_refused(lambda: client.infer(model, [given]), ("400",), "has shape")
    return ["http metadata", "http binary", "http json", "http default", "http classes", "http 404", "http 400"]


def over_grpc(address: str, model: str, golden: Any) -> list[str]:
    with tritonclient.grpc.InferenceServerClient(address) as client:
        check_metadata(client, model, {"as_json": True})
        tensor = client.get_model_metadata(model).inputs[0]
        given = tritonclient.grpc.InferInput(tensor.name, list(golden["input"].shape), tensor.datatype)
        given.set_data_from_numpy(golden["input"])
        for outputs in (None, [tritonclient.grpc.InferRequestedOutput("logits")]):
            answer = client.infer(model, [given], outputs=outputs, request_id="a-7", client_timeout=60)
            assert answer.get_response().id == "a-7"
            assert len(answer.get_response().raw_output_contents) == 1
            check_logits(answer.as_numpy("logits"), golden["logits"])
        top = [tritonclient.grpc.InferRequestedOutput("logits", class_count=1)]
        text = client.infer(model, [given], outputs=top).as_numpy("logits")[0, 0]
        assert int(text.decode().split(":")[1]) == int(golden["logits"][0].argmax())
        check_unknown(client, [given])
        wrong = tritonclient.grpc.InferInput(tensor.name, [1, 6], tensor.datatype)
        wrong.set_data_from_numpy(golden["input"].reshape(-1)[:6].reshape(1, 6))
        check_refused(lambda: client.infer(model, [wrong]), ("StatusCode.INVALID_ARGUMENT",), "has shape")
    return ["grpc metadata", "grpc raw", "grpc classes", "grpc NOT_FOUND", "grpc INVALID_ARGUMENT"]


def check_refused(call: Callable[[], Any], statuses: tuple[str, ...], message: str) -> None:
    """There is no pytest in this environment."""
    found = None
    try:
        call()
    except InferenceServerException as error:
        found = error
    assert found is not None, f"answered what should be refused with {statuses}"
    assert found.status() in statuses, found
    assert message in str(found), found


def main() -> None:
    model, path, *addresses = sys.argv[1:]
    golden = np.load(path)
    passed = over_http(addresses[0], model, golden)
    if len(addresses) > 1:
        passed += over_grpc(addresses[1], model, golden)
    print(json.dumps({"passed": passed}))


if __name__ == "__main__":
    main()
