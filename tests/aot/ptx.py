"""Runs a kernel's PTX on the CPU, block by block: what a compiler made, without a GPU.

The threads of a block go through the program together; branches that they would take apart are
errors. Only what the project's kernels of compute capability 8.0 use is there. Copies by
cp.async arrive as late as their waits allow, or at once, as `is_late` says: a kernel whose
waits and barriers are right gives the same with both.
"""

import re
from typing import Any

import numpy as np

_WIDTHS = {".b16": np.uint16, ".b32": np.uint32, ".b64": np.uint64, ".pred": np.bool_}
_SIGNED = {np.uint16: np.int16, np.uint32: np.int32, np.uint64: np.int64}
_LANE = np.arange(32)


def run(
    text: str, operands: list[np.ndarray], result: np.ndarray, grid: int, is_late: bool
) -> np.ndarray:
    """Return what a kernel of 128 threads a block writes into its last parameter.

    Args:
      operands: of its first parameters.
      result: what is in memory where it writes.
    """
    memory, addresses, end = [], [], 256
    for array in (*operands, result):
        octets = np.frombuffer(array.tobytes(), np.uint8)
        size = -(-len(octets) // 256) * 256
        memory.append(np.pad(octets, (0, size - len(octets))))
        addresses.append(end)
        end += size
    whole = np.concatenate([np.zeros(256, np.uint8), *memory])
    program = _Program(text)
    for block in range(grid):
        _Block(program, whole, addresses, block, is_late).run()
    written = whole[addresses[-1] : addresses[-1] + result.nbytes]
    return written.view(result.dtype).reshape(result.shape)


class _Program:
    def __init__(self, text: str) -> None:
        body = re.sub(r"//[^\n]*", "", text[text.index(".entry") :])
        body = re.sub(r"\.section.*", "", body, flags=re.DOTALL)
        body = re.sub(r"^\s*\.loc[^\n]*|\$L__(?:func|tmp)\w*:", "", body, flags=re.MULTILINE)
        body = body[body.index("{", body.index(")")) :]
        body = re.sub(r"(\$L\w+):", r"\1:;", body)
        self.kinds: dict[str, Any] = {}
        self.counted: list[tuple[str, Any]] = []
        self.code: list[tuple[str, str, list[str]]] = []  # predicate, operation, operands
        self.labels: dict[str, int] = {}
        for statement in body.split(";"):
            line = statement.lstrip("{} \n\t").strip()
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line.startswith(".reg"):
                self._declare(line)
            elif line and not line.startswith("."):
                predicate, operation, rest = re.fullmatch(
                    r"(@!?\S+ +)?(\S+)\s*(.*)", line, re.DOTALL
                ).groups()
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                self.code.append((predicate or "", operation, operands))

    def _declare(self, line: str) -> None:
        _, kind, names = re.split(r"\s+", line, maxsplit=2)
        for name in names.split(","):
            prefix, _, count = name.strip().partition("<")
            if count:
                self.counted.append((prefix, _WIDTHS[kind]))
            else:
                self.kinds[prefix] = _WIDTHS[kind]

    def kind(self, name: str) -> Any:
        if name not in self.kinds:
            prefix = name.rstrip("0123456789")
            self.kinds[name] = next(kind for start, kind in self.counted if start == prefix)
        return self.kinds[name]


class _Block:
    def __init__(
        self, program: _Program, memory: np.ndarray, addresses: list[int], block: int, late: bool
    ) -> None:
        self.program, self.memory, self.addresses = program, memory, addresses
        self.shared = np.zeros(228 * 1024, np.uint8)
        self.registers = {
            "%tid.x": np.arange(128, dtype=np.uint32),
            "%ctaid.x": np.full(128, block, np.uint32),
        }
        self.is_late, self.open, self.groups = late, [], []

    def run(self) -> None:
        at = 0
        while True:
            predicate, operation, operands = self.program.code[at]
            at += 1
            mask = self._mask(predicate)
            if operation.startswith("ret"):
                assert mask.all() or not mask.any()
                if mask.all():
                    assert not self.open
                    return
            elif operation.startswith("bra"):
                assert mask.all() or not mask.any(), "threads of a block part"
                if mask.all():
                    at = self.program.labels[operands[0]]
            else:
                self._one(operation.split("."), operands, mask)

    def _mask(self, predicate: str) -> np.ndarray:
        name = predicate.strip().lstrip("@")
        if not name:
            return np.ones(128, bool)
        value = self.registers[name.lstrip("!")]
        return ~value if name[0] == "!" else value

    def value(self, name: str, kind: Any) -> np.ndarray:
        if name in self.registers:
            return self.registers[name].astype(kind) if kind else self.registers[name]
        if name.startswith("0f"):
            return np.full(128, int(name[2:], 16), np.uint32)
        if name.startswith("__dynamic_shmem__"):
            return np.zeros(128, kind)
        number = int(name, 0) & (2 ** (8 * np.dtype(kind).itemsize) - 1)
        return np.full(128, number, kind)

    def put(self, name: str, value: np.ndarray) -> None:
        self.registers[name] = value.astype(self.program.kind(name))

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        return self.value(base.strip(), np.uint64).astype(np.int64) + int(offset or 0)

    def _names(self, operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{}").split(",")]

    def _one(self, operation: list[str], operands: list[str], mask: np.ndarray) -> None:
        name = operation[0]
        special = getattr(self, f"_{name}", None)
        if special is not None:
            special(operation, operands, mask)
            return
        target, *sources = operands
        if operation[-1] in ("f32", "f16x2", "bf16x2", "f16"):
            self.put(target, self._floats(operation, sources))
            return
        bits = {"16": np.uint16, "32": np.uint32, "64": np.uint64}.get(operation[-1][1:])
        kind = bits or np.bool_
        signed = operation[-1][0] == "s"
        wide = [self.value(s, kind) for s in sources]
        if signed:
            wide = [w.view(_SIGNED[kind]) for w in wide]
        self.put(target, self._integers(operation, wide, kind))

    def _integers(self, operation: list[str], w: list[np.ndarray], kind: Any) -> np.ndarray:
        name, bits = operation[0], 8 * np.dtype(kind).itemsize
        if name in ("mul", "mad") and operation[1] in ("wide", "hi"):
            # Exact, in Python's integers: a product of 64 bits has 128.
            product = w[0].astype(object) * w[1].astype(object)
            product = product >> bits if operation[1] == "hi" else product
            product = product + w[2] if name == "mad" else product
            return (product % 2**64).astype(np.uint64)
        if name in ("shl", "shr"):
            return w[0] << w[1] if name == "shl" else w[0] >> w[1]
        if name == "bfe":  # w[2] bits from bit w[1] on, with the sign of the highest
            unused = bits - w[1] - w[2]
            return (w[0] << unused) >> (unused + w[1])
        simple = {
            "add": lambda: w[0] + w[1],
            "sub": lambda: w[0] - w[1],
            "mul": lambda: w[0] * w[1],
            "mad": lambda: w[0] * w[1] + w[2],
            "div": lambda: w[0] // w[1],
            "rem": lambda: w[0] % w[1],
            "and": lambda: w[0] & w[1],
            "or": lambda: w[0] | w[1],
            "xor": lambda: w[0] ^ w[1],
            "not": lambda: ~w[0],
            "neg": lambda: -w[0],
            "min": lambda: np.minimum(w[0], w[1]),
            "max": lambda: np.maximum(w[0], w[1]),
            "mov": lambda: w[0],
            "shf": lambda: (w[0] >> w[2]) | (w[1] << (np.uint32(32) - w[2])),
        }
        return simple[name]()

    def _floats(self, operation: list[str], sources: list[str]) -> np.ndarray:
        kind = {"f32": np.float32, "f16": np.float16, "f16x2": np.float16}.get(operation[-1])
        if operation[0] == "cvt":
            return self._convert(operation, sources)
        bits = [self.value(s, np.uint32) for s in sources]
        if operation[-1] == "bf16x2":
            import ml_dtypes

            kind = ml_dtypes.bfloat16
        w = [b.view(kind).astype(np.float64) for b in bits]
        name = operation[0]
        made = {
            "add": lambda: w[0] + w[1],
            "sub": lambda: w[0] - w[1],
            "mul": lambda: w[0] * w[1],
            "fma": lambda: w[0] * w[1] + w[2],
            "mov": lambda: w[0],
        }[name]()
        return made.astype(kind).view(np.uint32)

    def _convert(self, operation: list[str], sources: list[str]) -> np.ndarray:
        import ml_dtypes

        kinds = {"f16": np.float16, "f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}
        if operation[-2] == "f32" and operation[-1] == "f16":
            value = self.registers[sources[0]].view(np.float16)
            return value.astype(np.float32).view(np.uint32)
        pair = [self.value(s, np.uint32).view(np.float32) for s in reversed(sources)]
        return np.ascontiguousarray(np.stack(pair, -1).astype(kinds[operation[-2]])).view(
            np.uint32
        )[:, 0]

    def _cvt(self, operation: list[str], operands: list[str], _: np.ndarray) -> None:
        target, *sources = operands
        if operation[-1].startswith("f"):
            self.put(target, self._convert(operation, sources))
            return
        value = self.registers[sources[0]]
        if operation[-1][0] == "s":
            value = value.view(_SIGNED[value.dtype.type])
        self.put(target, value)

    def _cvta(self, _: list[str], operands: list[str], __: np.ndarray) -> None:
        self.put(operands[0], self.registers[operands[1]])

    def _lop3(self, _: list[str], operands: list[str], __: np.ndarray) -> None:
        a, b, c = [self.value(o, np.uint32) for o in operands[1:4]]
        table = int(operands[4], 0)
        made = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                terms = [v if row >> (2 - i) & 1 else ~v for i, v in enumerate((a, b, c))]
                made |= terms[0] & terms[1] & terms[2]
        self.put(operands[0], made)

    def _prmt(self, _: list[str], operands: list[str], __: np.ndarray) -> None:
        a, b, chosen = [self.value(o, np.uint32) for o in operands[1:4]]
        octets = np.stack([a, b], -1).view(np.uint8)
        picked = [octets[np.arange(128), (chosen >> 4 * i) & 7] for i in range(4)]
        self.put(operands[0], np.ascontiguousarray(np.stack(picked, -1)).view(np.uint32)[:, 0])

    def _setp(self, operation: list[str], operands: list[str], _: np.ndarray) -> None:
        kind = {"16": np.uint16, "32": np.uint32, "64": np.uint64}[operation[-1][1:]]
        a, b = [self.value(o, kind) for o in operands[1:3]]
        if operation[-1][0] == "s":
            a, b = a.view(_SIGNED[kind]), b.view(_SIGNED[kind])
        compare = {
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "eq": np.equal,
            "ne": np.not_equal,
        }
        self.put(operands[0], compare[operation[1]](a, b))

    def _selp(self, operation: list[str], operands: list[str], _: np.ndarray) -> None:
        kind = self.program.kind(operands[0])
        a, b = [self.value(o, kind) for o in operands[1:3]]
        self.put(operands[0], np.where(self.registers[operands[3]], a, b))

    def _ld(self, operation: list[str], operands: list[str], mask: np.ndarray) -> None:
        names = self._names(operands[0])
        if operation[1].startswith("param"):
            number = int(re.search(r"_param_(\d+)", operands[1])[1])
            self.put(names[0], np.full(128, self.addresses[number], np.uint64))
            return
        assert operation[1] == "shared"
        assert mask.all()
        size = int(operation[-1][1:]) // 8
        kind = {2: np.uint16, 4: np.uint32}[size]
        address = self._address(operands[1])
        assert (address % (size * len(names)) == 0).all(), "not aligned"
        for index, name in enumerate(names):
            self.put(name, self._gather(address + index * size, size).view(kind)[:, 0])

    def _gather(self, address: np.ndarray, size: int) -> np.ndarray:
        return self.shared[address[:, None] + np.arange(size)]

    def _st(self, operation: list[str], operands: list[str], mask: np.ndarray) -> None:
        size = int(operation[-1][1:]) // 8
        address = self._address(operands[0])[mask]
        for index, name in enumerate(self._names(operands[1])):
            octets = self.value(name, np.uint32)[mask].reshape(-1, 1).view(np.uint8)
            self.memory[(address + index * size)[:, None] + np.arange(size)] = octets

    def _ldmatrix(self, _: list[str], operands: list[str], __: np.ndarray) -> None:
        address = self._address(operands[1]).reshape(4, 4, 8)  # warp, matrix, row
        assert (address % 16 == 0).all()
        assert all(len(np.unique(rows // 16 % 8)) == 8 for rows in address.reshape(-1, 8)), (
            "rows of a matrix share banks"
        )
        rows = self.shared[address[..., None] + np.arange(16)].view(np.uint32)  # .., 4 pairs
        for index, name in enumerate(self._names(operands[0])):
            self.put(name, rows[:, index].reshape(128))

    def _mma(self, operation: list[str], operands: list[str], _: np.ndarray) -> None:
        import ml_dtypes

        kind = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[operation[-2]]
        out, a, b, c = [self._names(operand) for operand in operands]
        group, lane = _LANE // 4, _LANE % 4
        halves = lambda name: self.registers[name].view(kind).astype(np.float64).reshape(4, 32, 2)
        left, right = np.zeros((4, 16, 16)), np.zeros((4, 16, 8))
        for index, name in enumerate(a):
            for one in range(2):
                row, column = group + 8 * (index % 2), 2 * lane + one + 8 * (index // 2)
                left[:, row, column] = halves(name)[:, :, one]
        for index, name in enumerate(b):
            for one in range(2):
                right[:, 2 * lane + one + 8 * index, group] = halves(name)[:, :, one]
        product = left @ right
        for index, (target, start) in enumerate(zip(out, c, strict=True)):
            old = self.value(start, np.uint32).view(np.float32).astype(np.float64)
            part = product[:, group + 8 * (index // 2), 2 * lane + index % 2]
            self.put(target, (part.reshape(128) + old).astype(np.float32).view(np.uint32))

    def _createpolicy(self, _: list[str], operands: list[str], __: np.ndarray) -> None:
        self.put(operands[0], np.zeros(128, np.uint64))

    def _bar(self, *_: Any) -> None:
        pass

    def _cp(self, operation: list[str], operands: list[str], mask: np.ndarray) -> None:
        if "commit_group" in operation:
            self.groups.append(self.open)
            self.open = []
        elif "wait_group" in operation:
            left = int(operands[0])
            while len(self.groups) > left:
                for target, octets in self.groups.pop(0):
                    self.shared[target] = octets
        else:
            target, source = [self._address(o)[mask] for o in operands[:2]]
            assert ((target | source) % 16 == 0).all(), "not aligned"
            octets = self.memory[source[:, None] + np.arange(16)]
            place = target[:, None] + np.arange(16)
            if self.is_late:
                self.open.append((place, octets))
            else:
                self.shared[place] = octets
