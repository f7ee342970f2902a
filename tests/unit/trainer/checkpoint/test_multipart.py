"""Parts of an object are sent by several threads, bounded, and the object exists whole or not at all."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from anyshard.trainer.checkpoint.multipart import PARALLEL, Upload


class Server:
    """The four operations of S3, with a door that parts wait at."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.parts: dict[int, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.open = threading.Event()
        self.arrived = threading.Semaphore(0)
        self._fails_at = fails_at

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        self.calls.append(operation)
        assert (arguments["Bucket"], arguments["Key"]) == ("b", "k")
        if operation == "upload_part":
            self.arrived.release()
            assert self.open.wait(10)
            if arguments["PartNumber"] == self._fails_at:
                raise OSError("the connection broke")
            self.parts[arguments["PartNumber"]] = arguments["Body"]
            return {"ETag": f"tag {arguments['PartNumber']}"}
        if operation == "complete_multipart_upload":
            named = arguments["MultipartUpload"]["Parts"]
            assert [each["ETag"] for each in named] == [f"tag {each['PartNumber']}" for each in named]
            self.objects["k"] = b"".join(self.parts[each["PartNumber"]] for each in named)
        if operation == "put_object":
            self.objects["k"] = arguments["Body"]
        return {"UploadId": "id"}


def test_parts_go_up_together_and_no_more_than_so_many() -> None:
    server, data = Server(), bytes(range(256)) * 4
    upload = Upload(server.call, "b", "k", part_bytes=100)
    writer = threading.Thread(target=lambda: [upload.write(memoryview(data)[at : at + 30]) for at in range(0, 1024, 30)])
    writer.start()
    for _ in range(PARALLEL):
        assert server.arrived.acquire(timeout=10)
    assert not server.arrived.acquire(timeout=0.2), "the others wait"
    assert writer.is_alive(), "so that the memory is bounded"
    server.open.set()
    writer.join(10)
    upload.finish()
    assert server.objects == {"k": data}
    assert {number: len(part) for number, part in server.parts.items()} == {**dict.fromkeys(range(1, 11), 100), 11: 24}


@pytest.mark.parametrize("size", [0, 99])
def test_what_fits_in_one_part_is_one_object(size: int) -> None:
    server = Server()
    upload = Upload(server.call, "b", "k", part_bytes=100)
    upload.write(memoryview(bytes(size)))
    upload.finish()
    assert (server.objects, server.calls) == ({"k": bytes(size)}, ["put_object"])


def test_a_part_that_fails_fails_the_upload() -> None:
    server = Server(fails_at=2)
    server.open.set()
    upload = Upload(server.call, "b", "k", part_bytes=100)
    upload.write(memoryview(bytes(160)))
    with pytest.raises(OSError, match="the connection broke"):
        upload.write(memoryview(bytes(10_000)))
    with pytest.raises(OSError, match="the connection broke"):
        upload.finish()
    upload.abort()
    assert server.objects == {}
    assert server.calls[-1] == "abort_multipart_upload"
