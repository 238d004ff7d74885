"""The picture inside a multipart/form-data body, in memory: nothing is spooled to a file."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dualtoken_deploy.serve.errors import BadRequest

LIBRARY = logging.getLogger("python_multipart")
LIBRARY.addHandler(logging.NullHandler())
LIBRARY.propagate = False  # it warns of every damaged form; the answer says it
MAX_PARTS = 8
MAX_HEADER_BYTES = 4096


@dataclass
class _Part:
    header: bytearray = field(default_factory=bytearray)
    name: bytearray = field(default_factory=bytearray)
    is_file: bool = False
    spans: list[bytes] = field(default_factory=list)


class _Collector:
    """Keeps the parts that the parser finds."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    def begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts; send one picture")
        self.parts.append(_Part())

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self.parts[-1].name, data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self.parts[-1].header, data[start:end])

    def header_end(self) -> None:
        part = self.parts[-1]
        if bytes(part.name).lower() == b"content-disposition":
            part.is_file = b"filename" in parse_options_header(bytes(part.header))[1]
        part.name, part.header = bytearray(), bytearray()

    def data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].spans.append(data[start:end])

    def _grow(self, target: bytearray, data: bytes) -> None:
        if len(target) + len(data) > MAX_HEADER_BYTES:
            raise BadRequest(f"a header of the form is longer than {MAX_HEADER_BYTES} bytes")
        target += data


def is_multipart(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def picture_of(body: bytes, content_type: str) -> bytes:
    """The first file of a form. Raises BadRequest where the form is damaged or has no file."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise BadRequest("multipart/form-data needs a boundary of 1 to 70 characters")
    collector = _Collector()
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": collector.begin,
            "on_header_field": collector.header_field,
            "on_header_value": collector.header_value,
            "on_header_end": collector.header_end,
            "on_part_data": collector.data,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the form is damaged ({error})") from error
    files = [part for part in collector.parts if part.is_file]
    if not files:
        raise BadRequest("the form has no file; send the picture as a file field")
    return b"".join(files[0].spans)
