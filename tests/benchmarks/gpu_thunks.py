"""What a compiled GPU program does, counted from XLA's own list of its thunks.

A thunk is one thing that the host tells the GPU to do: start a kernel, copy, call a library, launch a CUDA
graph, or go through a loop or a branch that holds other thunks. XLA writes the list of a program as indented
text, with labels such as "body:" for the parts of a loop. A line that this reader does not understand is an
error, since a skipped line would be a wrong count.

What the host does with a loop or a branch follows XLA's runtime (0.10 to 0.12). A loop whose number of
iterations is known needs no condition. Any other loop outside a CUDA graph runs its condition before each
iteration and waits for the answer; so does a branch. Inside a graph, the GPU decides by itself.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

MEASURES = ("launches", "outside", "graphs", "waits", "copies", "copied_bytes")
HOST_KINDS = (
    "kInfeed",
    "kOutfeed",
    "kHostSend",
    "kHostRecv",
    "kHostSendDone",
    "kHostRecvDone",
    "kHostExecuteStart",
)
CONTROL = ("kSequential", "kWaitForStreams")  # they start nothing of their own
THUNK = re.compile(r"(\d+): (k\w+)\s+\[([^\]]*)\](.*)")
LABEL = re.compile(r"(condition|body|\w*branch\w*):$")
INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*)")
SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(eq=False)
class Thunk:
    """One thunk. name: the HLO instruction that it carries out. parts: label -> thunks inside, in order."""

    kind: str
    name: str = ""
    parts: dict[str, list["Thunk"]] = field(default_factory=dict)

    @property
    def inner(self) -> list["Thunk"]:
        return [thunk for part in self.parts.values() for thunk in part]


@dataclass(frozen=True)
class Instruction:
    """What the optimised HLO says about an instruction.

    trips: iterations of a loop, None where they are unknown. size: bytes of its result. seconds: XLA's own
    estimate of its time, 0 where it has none. target: of a custom call.
    """

    trips: int | None = None
    size: int = 0
    seconds: float = 0.0
    target: str = ""


def parse(sequence: str, metadata: str) -> list[Thunk]:
    """The thunks of a program, from the texts `*thunk_sequence*.txt` and `*thunk_metadata.txt` of XLA's dump.

    Raises ValueError for a line that it does not understand.
    """
    names, root, last = names_of(metadata), Thunk("root", parts={"": []}), None
    stack = [(-1, root, "")]  # of open parts: indentation of their owner, the owner, the part's label
    for number, line in enumerate(_lines(sequence), 1):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if thunk := THUNK.match(text):
            while stack[-1][0] >= indent:
                stack.pop()
            _, owner, part = stack[-1]
            last = Thunk(thunk[2], names.get(int(thunk[1]), ""))
            owner.parts.setdefault(part, []).append(last)
            stack.append((indent, last, ""))
        elif text == "condition:" and last is not None and last.kind == "kWhile":
            # XLA does not indent this label; it follows right after its loop.
            last.parts["condition"] = []
            stack[-1] = (stack[-1][0], last, "condition")
        elif label := LABEL.match(text):
            wanted = "kWhile" if label[1] == "body" else "kConditional"
            while stack[-1][0] >= indent:
                stack.pop()
            open_at, owner, _ = stack.pop()
            if owner.kind != wanted:
                raise ValueError(f"line {number}: {text!r} belongs to no {wanted}")
            owner.parts[label[1]] = []
            stack.append((open_at, owner, label[1]))
        elif text:
            raise ValueError(
                f"line {number} of the thunks is not understood: {text[:80]!r}; has XLA's text changed?"
            )
    _check(root.inner, names)
    return root.inner


def _lines(sequence: str) -> Iterator[str]:
    """The lines; the first thunk inside a kSequential, which XLA puts on its owner's line, on its own."""
    for line in sequence.splitlines():
        thunk = THUNK.match(line.lstrip())
        if thunk and THUNK.match(thunk[4].lstrip()):
            start = len(line) - len(thunk[4])
            yield line[:start]
            yield line[start + 1 :]
        else:
            yield line


def names_of(metadata: str) -> dict[int, str]:
    """Thunk id -> HLO instruction. Graphs have no id, and share the number 0 in the list."""
    found = {}
    for block in metadata.split("thunk_info {")[1:]:
        number, name = (
            re.search(r"thunk_id: (\d+)", block),
            re.search(r'profile_annotation: "([^"]*)"', block),
        )
        if number:
            found[int(number[1])] = name[1] if name else ""
    return found


def _check(thunks: list[Thunk], names: dict[int, str]) -> None:
    everything = list(walk(thunks))
    if not everything:
        raise ValueError("the list of thunks is empty")
    for thunk in everything:
        if thunk.kind == "kWhile" and set(thunk.parts) != {"condition", "body"}:
            raise ValueError(
                f"the loop {thunk.name} has the parts {sorted(thunk.parts)}, not condition and body"
            )
        if thunk.kind == "kConditional" and len(thunk.parts) < 2:
            raise ValueError(f"the branch {thunk.name} has {len(thunk.parts)} ways")
        if thunk.kind == "kCommandBuffer" and not thunk.inner:
            raise ValueError("a CUDA graph without a launch")
    listed = {thunk.name for thunk in everything}
    # A graph has a name of its own in the metadata, but no number by which the list could give it.
    if missing := {n for n in names.values() if n and not n.startswith("command_buffer")} - listed:
        raise ValueError(f"{len(missing)} thunks of the metadata are not in the list, such as {min(missing)}")


def walk(thunks: list[Thunk]) -> Iterator[Thunk]:
    """All thunks, those inside others as well."""
    for thunk in thunks:
        yield thunk
        yield from walk(thunk.inner)


def instructions(hlo: str) -> dict[str, Instruction]:
    """Instruction's name -> what is known of it, from the optimised HLO text of a program."""
    found = {}
    for line in hlo.splitlines():
        if match := INSTRUCTION.match(line.strip()):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            micros = re.search(r'"exec_time_us":([\d.eE+\-]+)', line)
            target = re.search(r'custom_call_target="([^"]*)"', line)
            found[match[1]] = Instruction(
                int(trips[1]) if trips else None,
                size_of(_type(match[2])),
                float(micros[1]) * 1e-6 if micros else 0.0,
                target[1] if target else "",
            )
    return found


def _type(text: str) -> str:
    """The type with which the right side of an HLO instruction begins; that of a tuple stands in brackets."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            return text[:i]
    return text


def size_of(shapes: str) -> int:
    """Bytes of all arrays named in an HLO type, such as "(f32[64,2]{1,0}, pred[])"."""
    total = 0
    for name, bits, dims in SHAPE.findall(shapes):
        count = math.prod(int(n) for n in dims.split(",") if n)
        total += count if name == "pred" else math.ceil(count * int(bits) / 8)
    return total


@dataclass(frozen=True)
class Costs:
    """Assumed times, in microseconds. None of them was measured here.

    node: least time of a launch inside a CUDA graph, from one start to the next. launch: the same outside
    graphs. graph: what the launch of a graph adds. wait: what a host that waits for the GPU adds.
    """

    node: float
    launch: float
    graph: float
    wait: float


COSTS = {"low": Costs(1.4, 2.0, 5.0, 10.0), "high": Costs(2.9, 5.0, 10.0, 25.0)}


@dataclass(frozen=True)
class Counting:
    """Counts what thunks do.

    hlo: what `instructions` found. loops: the iterations that are assumed where XLA knows no number, in the
    outer such loop, in one inside it, and so on; the last one holds further inward. bandwidth: of the GPU's
    memory, in bytes per second.
    """

    hlo: dict[str, Instruction]
    loops: tuple[int, ...]
    bandwidth: float

    def count(self, thunks: list[Thunk], graph: bool = False, depth: int = 0) -> Counter:
        """What one execution of `thunks` does: the MEASURES, and seconds between "low" and "high".

        launches: kernels, copies, fills and library calls; a library call counts as one. outside: those of
        them that no CUDA graph holds. graphs: launches of graphs. waits: times that the host waits for the
        GPU. copies, copied_bytes: inside the GPU's memory; for an instruction with several results, the bytes
        of all. Of a branch, the way with most launches counts.
        """
        total = Counter()
        for thunk in thunks:
            if thunk.kind == "kCommandBuffer":
                total += _timed("graph") + self.count(thunk.inner, True, depth)
            elif thunk.kind == "kWhile":
                total += self._loop(thunk, graph, depth)
            elif thunk.kind == "kConditional":
                ways = [self.count(part, graph, depth) for part in thunk.parts.values()]
                total += max(ways, key=lambda way: way["launches"])
                total += Counter() if graph else _timed("wait")
            elif thunk.parts:
                total += self.count(thunk.inner, graph, depth)
            elif thunk.kind not in CONTROL:
                total += self._launch(thunk, graph)
        return total

    def _loop(self, thunk: Thunk, graph: bool, depth: int) -> Counter:
        trips = self.trips(thunk)
        known, inner = trips is not None, depth + (trips is None)
        trips = trips if known else self.loops[min(depth, len(self.loops) - 1)]
        total = _times(self.count(thunk.parts["body"], graph, inner), trips)
        if graph or not known:
            total += _times(self.count(thunk.parts["condition"], graph, inner), trips + 1)
        return total + (Counter() if graph or known else _timed("wait", trips + 1))

    def _launch(self, thunk: Thunk, graph: bool) -> Counter:
        info = self.hlo.get(thunk.name, Instruction())
        total, seconds = Counter(launches=1, outside=int(not graph)), info.seconds
        if thunk.kind == "kCopy":  # each byte is read and written; XLA estimates kernels alone
            total += Counter(copies=1, copied_bytes=info.size)
            seconds = max(seconds, 2 * info.size / self.bandwidth)
        for bound, costs in COSTS.items():
            total[bound] = max(seconds, 1e-6 * (costs.node if graph else costs.launch))
        waits = thunk.kind in HOST_KINDS or "callback" in info.target
        return total + (_timed("wait") if waits else Counter())

    def trips(self, thunk: Thunk) -> int | None:
        """Iterations of a loop, None where XLA does not know them."""
        if thunk.name not in self.hlo:
            raise ValueError(f"the loop {thunk.name!r} is not in the program's HLO text")
        return self.hlo[thunk.name].trips

    def main_loop(self, thunks: list[Thunk]) -> tuple[Thunk, int] | None:
        """Of the outermost loops with a known number of iterations the one with most, and its number."""
        found = []
        for thunk in thunks:
            trips = self.trips(thunk) if thunk.kind == "kWhile" else None
            inside = self.main_loop(thunk.inner) if trips is None else (thunk, trips)
            found += [inside] if inside else []
        return max(found, key=lambda pair: pair[1], default=None)


def _timed(what: str, number: int = 1) -> Counter:
    """So many launches of a graph, or waits of the host: what="graph" or "wait"."""
    seconds = {bound: number * 1e-6 * getattr(costs, what) for bound, costs in COSTS.items()}
    return Counter({f"{what}s": number, **seconds})


def _times(counter: Counter, factor: int) -> Counter:
    return Counter({name: factor * number for name, number in counter.items()})
