"""A machine of several GPUs that runs the PTX of `pallas_kernels/_exchange.py`, in any order.

It knows the instructions that occur there, and no more. What a real machine leaves open is drawn at
random: which thread goes on, how fast a GPU is, and when and in which order stores arrive, of which
only 8 bytes are sure to arrive as one. So what is right here by luck fails with another seed.
"""

import random
import re
from collections.abc import Callable, Sequence

import numpy as np

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1

Kernel = list[list[dict[str, int]]]  # programs, which are threads, which are their registers


def parse(snippet: str) -> tuple[list[tuple], dict[str, int]]:
    """Return the instructions (predicate, opcode, operands), and the labels' places among them."""
    body = re.sub(r"\.reg [^;]*;", "", snippet.strip()[1:-1])
    code, labels = [], {}
    for statement in body.split(";"):
        while match := re.match(r"\s*(\w+):", statement):
            labels[match[1]] = len(code)
            statement = statement[match.end() :]
        if not statement.strip():
            continue
        match = re.fullmatch(r"\s*(@!?\w+)?\s*([\w.]+)\s*(.*?)\s*", statement, re.DOTALL)
        assert match, statement
        guard, opcode, rest = match.groups()
        code.append((guard, opcode, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)))
    return code, labels


def float_of(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def bits_of(number: np.float32) -> int:
    return int(np.float32(number).view(np.uint32))


def to_bfloat16(bits: int) -> int:
    """The upper half of a float32, rounded to nearest even; no infinity and no NaN comes here."""
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


class Machine:
    """GPUs, each with `size` bytes of memory at `address(gpu)`, which all can reach."""

    def __init__(self, gpus: int, size: int, seed: int):
        self.size, self.random = size, random.Random(seed)
        self.memory = np.zeros(gpus * size // 4, np.uint32)
        self.under_way = [[] for _ in range(gpus)]  # by sender: (address, words)
        self.speed = [self.random.choice([0.05, 0.3, 1.0]) for _ in range(gpus)]

    def address(self, gpu: int) -> int:
        return (gpu + 1) * self.size

    def words(self, address: int, count: int) -> np.ndarray:
        first = (address - self.size) // 4
        return self.memory[first : first + count]

    def run(self, kernels: Sequence[Sequence[Kernel]], snippet_of: Callable[[int], str]) -> None:
        """Run a queue of kernels on each GPU, each after the one before it has ended.

        Args:
            kernels: by GPU; the threads' registers will have the results.
            snippet_of: the PTX of the n-th kernel.
        """
        active = [self._kernels(gpu, queue, snippet_of) for gpu, queue in enumerate(kernels)]
        running = list(range(len(active)))
        while running:
            gpu = self.random.choice(running)
            if self.random.random() < self.speed[gpu] and next(active[gpu], "ended") == "ended":
                running.remove(gpu)
            sender = self.random.choice(self.under_way)
            for _ in range(min(len(sender), self.random.choice([0, 1, 8]))):
                self._deliver(sender.pop(self.random.randrange(len(sender))))

    def _deliver(self, store: tuple[int, list[int]]) -> None:
        address, words = store
        self.words(address, len(words))[:] = words

    def _kernels(self, gpu: int, queue, snippet_of):
        for number, programs in enumerate(queue):
            code = parse(snippet_of(number))
            groups = [[self._thread(gpu, code, regs) for regs in program] for program in programs]
            waiting = [0] * len(groups)
            threads = [
                (group, thread) for group, members in enumerate(groups) for thread in members
            ]
            while threads:
                place = self.random.randrange(len(threads))
                group, thread = threads[place]
                event = next(thread, "ended")
                if event == "ended":
                    threads.pop(place)
                elif event == "barrier":
                    threads.pop(place)
                    waiting[group] += 1
                    if waiting[group] == len(groups[group]):
                        threads += [(group, member) for member in groups[group]]
                yield
            # A kernel that has ended has written to its own memory; what it sent may be under way.
            own = range(self.address(gpu), self.address(gpu) + self.size)
            for store in [s for s in self.under_way[gpu] if s[0] in own]:
                self.under_way[gpu].remove(store)
                self._deliver(store)

    def _thread(self, gpu: int, code, regs: dict[str, int]):
        """Run a thread; yields where others may come between, and at a barrier."""
        instructions, labels = code

        def value(operand: str) -> int:
            if operand in regs:
                return regs[operand]
            if operand == "%globaltimer":
                return 1
            return int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)

        def place(operand: str) -> int:
            base, _, offset = operand[1:-1].partition("+")
            return regs[base] + int(offset or 0)

        def parts(operand: str) -> list[str]:
            return operand[1:-1].replace(" ", "").split(",")

        at = 0
        while at < len(instructions):
            guard, opcode, args = instructions[at]
            at += 1
            if guard and regs[guard.strip("@!")] == guard.startswith("@!"):
                continue
            name, *kind = opcode.split(".")
            if name == "bra":
                at = labels[args[0]]
            elif name == "bar":
                yield "barrier"
            elif name == "trap":
                raise RuntimeError("a thread has waited for too long")
            elif opcode == "ld.volatile.global.v4.b32":
                names, address = parts(args[0]), place(args[1])
                for first in self.random.sample([0, 2], 2):  # either pair may be read first
                    yield
                    pair = self.words(address + 4 * first, 2).tolist()
                    regs.update(zip(names[first : first + 2], pair, strict=True))
            elif name == "ld":
                count = {"b32": 1, "b64": 2}[kind[-1]]
                found = self.words(place(args[1]), count).tolist()
                regs[args[0]] = sum(word << 32 * i for i, word in enumerate(found))
            elif opcode == "st.volatile.global.v4.b32":
                words, address = [value(word) for word in parts(args[1])], place(args[0])
                self.under_way[gpu] += [(address, words[:2]), (address + 8, words[2:])]
                yield
            elif name == "st":
                self.under_way[gpu].append((place(args[0]), [value(args[1])]))
            elif name == "mov" and args[1].startswith("{"):
                low, high = map(value, parts(args[1]))
                regs[args[0]] = low | high << 32
            elif name == "mov" and args[0].startswith("{"):
                low, high = parts(args[0])
                regs[low], regs[high] = value(args[1]) & MASK32, value(args[1]) >> 32
            elif name == "setp":
                first, second = value(args[1]), value(args[2])
                if kind[-1] == "s32":
                    first, second = ((v ^ 1 << 31) - (1 << 31) for v in (first, second))
                result = {
                    "eq": first == second,
                    "ne": first != second,
                    "lt": first < second,
                    "gt": first > second,
                }[kind[0]]
                regs[args[0]] = result or ("or" in kind and regs[args[3]])
            elif opcode == "cvt.rn.bf16x2.f32":
                upper, lower = (to_bfloat16(value(arg)) for arg in args[1:])
                regs[args[0]] = upper << 16 | lower
            elif opcode == "add.f32":
                regs[args[0]] = bits_of(float_of(value(args[1])) + float_of(value(args[2])))
            else:
                numbers = [value(arg) for arg in args[1:]]
                result = {
                    "mov": lambda a: a,
                    "cvt": lambda a: a,
                    "add": lambda a, b: a + b,
                    "mul": lambda a, b: a * b,
                    "and": lambda a, b: a & b,
                    "shl": lambda a, b: a << b,
                    "div": lambda a, b: a // b,
                    "rem": lambda a, b: a % b,
                    "max": max,
                }[name](*numbers)
                wide = kind[-1].endswith("64") or "wide" in kind
                regs[args[0]] = result & (MASK64 if wide else MASK32)
