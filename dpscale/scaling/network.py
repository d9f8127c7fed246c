"""What a network does with an all-reduce: an alpha-beta model with bandwidth that depends on the message's size.

    bandwidth(m) = plateau * m / (m + half)         m: bytes of the whole message
    ring of p:     2 (p - 1) / p * m / bandwidth(m) + 2 (p - 1) * latency
    double tree:   2 m / bandwidth(m) + 2 ceil(log2 p) * latency
    several nodes: reduce-scatter inside, all-reduce between the nodes (the node's bandwidth is shared by its devices,
                   which reduce a part each), all-gather inside

Source: Hockney's alpha-beta model; Thakur, Rabenseifner and Gropp 2005 for the counts of steps and bytes; Sanders,
Speck and Träff 2009 for two trees at full bandwidth.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from dpscale.config import nearest
from dpscale.errors import InputError

SHIPPED = Path(__file__).parent / "networks"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Link(_Table):
    """`bandwidth_gb_s`: one way, in 10^9 bytes a second; of a device inside a node, of a whole node between nodes.

    `plateau`: what a large message gets of it; `half_mib`: the message that gets half the plateau.
    """

    bandwidth_gb_s: float = Field(gt=0)
    plateau: float = Field(1.0, gt=0, le=1)
    half_mib: float = Field(0.0, ge=0)
    latency_us: float = Field(0.0, ge=0)
    source: str

    def wire_s(self, volume: float, message: float) -> float:
        """Seconds for `volume` bytes of a collective on a message of `message` bytes."""
        rate = 1e9 * self.bandwidth_gb_s * self.plateau
        return volume / rate * (1 + self.half_mib * 2**20 / message)

    @property
    def latency_s(self) -> float:
        """Seconds of one hop."""
        return 1e-6 * self.latency_us


class Device(_Table):
    """Estimates for what no record says: nanoseconds for each parameter."""

    name: str
    noise_ns: float = Field(ge=0)
    update_ns: float = Field(ge=0)
    source: str


class Network(_Table):
    """A network profile."""

    name: str
    devices_per_node: int = Field(ge=1)
    intra: Link
    inter: Link
    device: Device


@dataclass(frozen=True)
class Reduction:
    """One all-reduce. `latency_s` and `wire_s` add up to its time; `limit_s`: the wire alone, at full bandwidth."""

    algorithm: str
    latency_s: float
    wire_s: float
    limit_s: float

    @property
    def seconds(self) -> float:
        """Latency and wire."""
        return self.latency_s + self.wire_s


def all_reduce(network: Network, devices: int, message: float) -> Reduction:
    """The faster of ring and double tree for `message` bytes over `devices` devices, on as few nodes as they fit.

    Edge cases: one device takes no time. Counts that do not fill the nodes are taken as ceil(devices / per node) nodes.
    """
    if devices == 1:
        return Reduction("none", 0.0, 0.0, 0.0)
    inside = min(devices, network.devices_per_node)
    nodes = -(-devices // network.devices_per_node)
    found = [_hierarchical(network, inside, nodes, message, kind) for kind in ("ring", "tree")]
    return min(found, key=lambda reduction: reduction.seconds)


def load_network(name: str) -> Network:
    """The profile of that name, or in that file (a path that ends in .toml).

    Raises: InputError when there is none, or it holds anything wrong.
    """
    path = Path(name).expanduser() if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.exists():
        known = sorted(file.stem for file in SHIPPED.glob("*.toml"))
        raise InputError(
            f"there is no network profile {name!r}: {nearest(name, known)} Or give a .toml file of your own"
        )
    try:
        return Network.model_validate({"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"network profile {path} cannot be read ({error}): give a readable TOML file") from error
    except pydantic.ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"network profile {path}: {wrong}. Start from {SHIPPED / 'h100.toml'}") from None


def _hierarchical(network: Network, inside: int, nodes: int, message: float, kind: str) -> Reduction:
    latency = wire = limit = 0.0
    if inside > 1:
        hops, volume = _cost(inside, message, "ring" if nodes > 1 else kind)
        latency += hops * network.intra.latency_s
        wire += network.intra.wire_s(volume, message)
        limit += 2 * (inside - 1) / inside * message / (1e9 * network.intra.bandwidth_gb_s)
    if nodes > 1:
        hops, volume = _cost(nodes, message, kind)
        latency += hops * network.inter.latency_s
        wire += network.inter.wire_s(volume, message)
        limit += 2 * (nodes - 1) / nodes * message / (1e9 * network.inter.bandwidth_gb_s)
    return Reduction(kind, latency, wire, limit)


def _cost(members: int, message: float, kind: str) -> tuple[float, float]:
    """(hops, bytes that each member sends) of an all-reduce."""
    if kind == "ring":
        return 2.0 * (members - 1), 2 * (members - 1) / members * message
    return 2.0 * math.ceil(math.log2(members)), 2 * message
