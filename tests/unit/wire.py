"""Every vhost-user message in either direction, and payloads to send in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from hypothesis import strategies as st

from vhostbridge.backends.vhostuser import payloads as p
from vhostbridge.backends.vhostuser.codec import Decoder, encode_reply, encode_request
from vhostbridge.backends.vhostuser.messages import BackendRequest, Request
from vhostbridge.backends.vhostuser.payloads import Payload
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS, Spec

# For each message: there are 108 rows.
EXAMPLES = 6

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)
U64 = st.integers(0, 2**64 - 1)
U8 = st.integers(0, 0xFF)

REGION = st.builds(p.Region, U64, U64, U64, U64)
PAYLOADS: dict[type[Payload], st.SearchStrategy[Payload]] = {
    p.Empty: st.just(p.Empty()),
    p.U64: st.builds(p.U64, U64),
    p.VringState: st.builds(p.VringState, U32, U32),
    p.VringAddr: st.builds(p.VringAddr, U32, U32, U64, U64, U64, U64),
    p.VringFd: st.builds(p.VringFd, U8, st.booleans()),
    p.MemTable: st.lists(REGION, max_size=8).map(lambda regions: p.MemTable(tuple(regions))),
    p.MemReg: st.builds(p.MemReg, REGION),
    p.Log: st.builds(p.Log, U64, U64),
    p.Iotlb: st.builds(p.Iotlb, U64, U64, U64, U8, U8),
    p.Config: st.builds(p.Config, st.integers(0, 128), U32, st.binary(max_size=128)),
    p.VringArea: st.builds(p.VringArea, U64, U64, U64),
    p.Inflight: st.builds(p.Inflight, U64, U64, U16, U16),
    p.Uuid: st.builds(p.Uuid, st.one_of(st.just(b""), st.binary(min_size=16, max_size=16))),
    p.StateTransfer: st.builds(p.StateTransfer, U32, U32),
    p.Mmap: st.builds(p.Mmap, U8, U64, U64, U64, U64),
    p.ShmemConfig: st.builds(
        p.ShmemConfig, U32, st.tuples(U64, U64).map(lambda sizes: sizes * 128)
    ),
    p.Raw: st.builds(p.Raw, st.binary(max_size=200)),
}


@dataclass(frozen=True)
class Row:
    """One message in one direction."""

    request: IntEnum
    reply: bool

    @property
    def specs(self) -> Mapping[int, Spec]:
        return FRONTEND_SPECS if isinstance(self.request, Request) else BACKEND_SPECS

    @property
    def payload(self) -> type[Payload]:
        spec = self.specs[self.request]
        return (spec.reply or p.U64) if self.reply else spec.payload

    @property
    def fds(self) -> tuple[int, int]:
        spec = self.specs[self.request]
        return spec.reply_fds if self.reply else spec.fds

    def decoder(self) -> Decoder:
        return Decoder(self.specs, replies=self.reply, peer="peer")

    def encode(self, payload: Payload, *, need_reply: bool = False) -> bytes:
        if self.reply:
            return encode_reply(self.request, payload)
        return encode_request(self.request, payload, need_reply=need_reply)


REQUESTS: list[IntEnum] = [*Request, *BackendRequest]
ROWS = [Row(request, reply) for request in REQUESTS for reply in (False, True)]


def ids(row: Row) -> str:
    side = "frontend" if isinstance(row.request, Request) else "backend"
    return f"{side}-{row.request.name}-{'reply' if row.reply else 'request'}"
