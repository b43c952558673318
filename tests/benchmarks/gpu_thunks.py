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
HOST_KINDS = [
    "kInfeed",
    "kOutfeed",
    "kHostSend",
    "kHostSendDone",
    "kHostRecv",
    "kHostRecvDone",
    "kHostExecuteStart",
]
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
    estimate of its time, 0 where there is none. target: of a custom call. flops, moved: operations of a
    product, and bytes of both its factors and its result; 0 for all else.
    """

    trips: int | None = None
    size: int = 0
    seconds: float = 0.0
    target: str = ""
    flops: int = 0
    moved: int = 0


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
        name = re.search(r'profile_annotation: "([^"]*)"', block)
        if number := re.search(r"thunk_id: (\d+)", block):
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
    matches = [INSTRUCTION.match(line.strip()) for line in hlo.splitlines()]
    lines = {match[1]: match[2] for match in matches if match}
    arrays = {name: _arrays(line) for name, line in lines.items()}
    found = {}
    for name, line in lines.items():
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        micros = re.search(r'"exec_time_us":([\d.eE+\-]+)', line)
        target = re.search(r'custom_call_target="([^"]*)"', line)
        found[name] = Instruction(
            int(trips[1]) if trips else None,
            sum(size for size, _ in arrays[name]),
            float(micros[1]) * 1e-6 if micros else 0.0,
            target[1] if target else "",
            *(_product(line, arrays, arrays[name][0]) if target and "cublas" in target[1] else ()),
        )
    return found


def _product(line: str, arrays: dict[str, list], result: tuple[int, list[int]]) -> tuple[int, int]:
    """`flops` and `moved` of a call of cuBLAS."""
    left, right = re.search(r"\(%?([\w.\-]+), %?([\w.\-]+)", line[line.index(" custom-call(") :]).groups()
    sums = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line)[1]
    (left_size, left_shape), (right_size, _) = arrays[left][0], arrays[right][0]
    terms = math.prod(left_shape[int(axis)] for axis in re.findall(r"\d+", sums))
    return 2 * terms * math.prod(result[1]), left_size + right_size + result[0]


def _arrays(line: str) -> list[tuple[int, list[int]]]:
    """(bytes, shape) of each array in the type with which the right side of an HLO instruction begins."""
    depth, end = 0, len(line)
    for i, letter in enumerate(line):  # the type of a tuple has brackets, and spaces inside them
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            end = i
            break
    found = []
    for name, bits, dims in SHAPE.findall(line[:end]):
        shape = [int(n) for n in dims.split(",") if n]
        found.append((math.ceil(math.prod(shape) * (8 if name == "pred" else int(bits)) / 8), shape))
    return found


@dataclass(frozen=True)
class Costs:
    """Assumed times, in microseconds. None of them was measured here.

    node: least time of a launch inside a CUDA graph, from one start to the next. launch: the same outside
    graphs. graph: what the launch of a graph adds. wait: what a host that waits for the GPU adds.

    tensor: how many times as fast as the card's FP32 units products are. Tensor cores have eight times their
    rate in TF32, which is JAX's default. cached: whether the factors of products are in the cache.
    """

    node: float
    launch: float
    graph: float
    wait: float
    tensor: float
    cached: bool


COSTS = {"low": Costs(1.4, 2.0, 5.0, 10.0, 8.0, True), "high": Costs(2.9, 5.0, 10.0, 25.0, 1.0, False)}


@dataclass(frozen=True)
class Speed:
    """Of a card: bandwidth of its memory in bytes per second, and FP32 operations per second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Counting:
    """Counts what thunks do.

    hlo: what `instructions` found. loops: the iterations that are assumed where XLA knows no number, in the
    outer such loop, in one inside it, and so on; the last one holds further inward.
    """

    hlo: dict[str, Instruction]
    loops: tuple[int, ...]
    speed: Speed

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
        info, copies = self.hlo.get(thunk.name, Instruction()), thunk.kind == "kCopy"
        total = Counter(launches=1, outside=int(not graph))
        total += Counter(copies=1, copied_bytes=info.size) if copies else Counter()
        for bound, costs in COSTS.items():
            least = costs.node if graph else costs.launch
            moved = 2 * info.size if copies else 0 if costs.cached else info.moved  # a copy reads and writes
            needed = max(info.flops / (costs.tensor * self.speed.flops), moved / self.speed.bandwidth)
            own = 0.0 if info.flops else info.seconds  # XLA's table has no product as small as ours
            total[bound] = max(1e-6 * least, own, needed)
        waits = thunk.kind in HOST_KINDS or "callback" in info.target
        return total + (_timed("wait") if waits else Counter())

    def trips(self, thunk: Thunk) -> int | None:
        """Iterations of a loop, None where XLA does not know them."""
        if thunk.name not in self.hlo:
            raise ValueError(f"the loop {thunk.name!r} is not in the program's HLO text")
        return self.hlo[thunk.name].trips

    def main_loop(self, thunks: list[Thunk], graph: bool = False) -> tuple[Thunk, int, bool] | None:
        """Of the outermost loops with a known number of iterations the one with most, its number, and whether
        a CUDA graph holds it. `graph` says so of `thunks`.
        """
        found = []
        for thunk in thunks:
            trips = self.trips(thunk) if thunk.kind == "kWhile" else None
            inside = graph or thunk.kind == "kCommandBuffer"
            loop = (thunk, trips, graph) if trips is not None else self.main_loop(thunk.inner, inside)
            found += [loop] if loop else []
        return max(found, key=lambda loop: loop[1], default=None)


def _timed(what: str, number: int = 1) -> Counter:
    """So many launches of a graph, or waits of the host: what="graph" or "wait"."""
    seconds = {bound: number * 1e-6 * getattr(costs, what) for bound, costs in COSTS.items()}
    return Counter({f"{what}s": number, **seconds})


def _times(counter: Counter, factor: int) -> Counter:
    return Counter({name: factor * number for name, number in counter.items()})
