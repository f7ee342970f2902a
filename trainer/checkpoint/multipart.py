"""One object of an S3 store, sent in parts by several threads while it is being made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PARALLEL = 4
"""Parts on their way at a time; each is held in memory."""


class Upload:
    """An object that exists when `finish` returns, and not before.

    Host memory: `PARALLEL + 1` parts.

    Args:
        call: an operation of the S3 API with its arguments; called from any thread.
        part_bytes: size of every part but the last; at least 5 MiB, as the API wants it.
    """

    def __init__(self, call: Callable[..., Any], bucket: str, key: str, *, part_bytes: int) -> None:
        self._call, self._where = call, {"Bucket": bucket, "Key": key}
        self._part_bytes = part_bytes
        self._pending = bytearray()
        self._id: str | None = None
        self._sent: list[Future[dict[str, Any]]] = []
        self._free = threading.Semaphore(PARALLEL)
        self._threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="checkpoint-upload")

    def write(self, data: memoryview) -> None:
        """Append; waits where `PARALLEL` parts are on their way. Raises what an earlier part raised."""
        while data:
            taken = data[: self._part_bytes - len(self._pending)]
            self._pending += taken
            data = data[len(taken) :]
            if len(self._pending) == self._part_bytes:
                self._send()

    def _send(self) -> None:
        if self._id is None:
            self._id = self._call("create_multipart_upload", **self._where)["UploadId"]
        self._free.acquire()
        for part in self._sent:
            if part.done():
                part.result()
        body, self._pending = bytes(self._pending), bytearray()
        self._sent.append(self._threads.submit(self._part, len(self._sent) + 1, body))

    def _part(self, number: int, body: bytes) -> dict[str, Any]:
        try:
            answer = self._call("upload_part", **self._where, UploadId=self._id, PartNumber=number, Body=body)
        finally:
            self._free.release()
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def finish(self) -> None:
        """Send the rest, wait for all parts, and make the object exist. Raises what any part raised."""
        if self._id is None:
            self._call("put_object", **self._where, Body=bytes(self._pending))
        else:
            if self._pending:
                self._send()
            parts = {"Parts": [part.result() for part in self._sent]}
            self._call("complete_multipart_upload", **self._where, UploadId=self._id, MultipartUpload=parts)
        self._threads.shutdown()

    def abort(self) -> None:
        """Let go of everything that was sent."""
        self._threads.shutdown(cancel_futures=True)
        if self._id is not None:
            with contextlib.suppress(Exception):  # the bucket's own rules end it
                self._call("abort_multipart_upload", **self._where, UploadId=self._id)
