#!/usr/bin/env python3
"""Lists the defers of a Go executable by means of its own, to check deferprof's scan against.

    objdump_oracle.py BINARY [--objdump PROGRAM]

It shares nothing with deferprof: it reads pclntab with the small reader below (written from
Go's runtime/symtab.go), takes the machine code as objdump prints it, and looks for

  * calls of runtime.deferproc, deferprocStack and deferprocat, in any function;
  * in each function with FUNCDATA_OpenCodedDeferInfo, the stores of closures into the slots that
    the funcdata declares: 8-byte stores to a slot's stack cell behind the first store to deferBits.

One line a site: `pc mechanism bit file:line` in hexadecimal and decimal, `-` for no bit; and one
`declared` line a function with open-coded defers: `declared entry count`, the count that the
funcdata gives up to 1.21 (from 1.22 it holds none, and the size of the slot array stands for it).
Only what needs no section headers beyond pclntab's is supported: executables of Go's own linker.
"""

import argparse
import re
import struct
import subprocess
import sys
from bisect import bisect_right


class Elf:
    def __init__(self, data):
        self.data = data
        assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
        self.machine = struct.unpack_from("<H", data, 18)[0]
        shoff = struct.unpack_from("<Q", data, 40)[0]
        phoff = struct.unpack_from("<Q", data, 32)[0]
        phnum, = struct.unpack_from("<H", data, 56)
        shnum, shstrndx = struct.unpack_from("<HH", data, 60)
        self.loads = []
        for i in range(phnum):
            kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, phoff + 56 * i)
            if kind == 1:
                self.loads.append((address, offset, size))
        raw = [struct.unpack_from("<IIQQQQ", data, shoff + 64 * i) for i in range(shnum)]
        names = raw[shstrndx][4] if shnum else 0
        self.sections = {}
        for name, _, _, address, offset, size in raw:
            end = data.index(b"\0", names + name)
            self.sections[data[names + name:end].decode()] = (address, offset, size)

    def at(self, address):
        for start, offset, size in self.loads:
            if start <= address < start + size:
                return offset + address - start
        raise KeyError(hex(address))

    def symbol(self, wanted):
        _, offset, size = self.sections[".symtab"]
        _, names, _ = self.sections[".strtab"]
        for at in range(offset, offset + size, 24):
            name, _, _, _, value = struct.unpack_from("<IBBHQ", self.data, at)
            start = names + name
            if self.data[start:self.data.index(b"\0", start)].decode() == wanted:
                return value
        raise KeyError(wanted)

    def u64(self, address):
        return struct.unpack_from("<Q", self.data, self.at(address))[0]


def uvarint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


class Table:
    """pclntab and moduledata of a release from 1.7 on."""

    def __init__(self, elf, minor):
        self.elf, self.minor = elf, minor
        self.address, self.base, _ = elf.sections[".gopclntab"]
        data, base = elf.data, self.base
        magic, = struct.unpack_from("<I", data, base)
        expected = 0xFFFFFFFB if minor < 16 else 0xFFFFFFFA if minor < 18 else \
            0xFFFFFFF0 if minor < 20 else 0xFFFFFFF1
        assert magic == expected, hex(magic)
        self.quantum = data[base + 6]
        self.count, = struct.unpack_from("<Q", data, base + 8)
        if minor < 16:
            self.names = self.pctab = self.cutab = base
            self.functab, self.funcs = base + 16, base
            after, = struct.unpack_from("<I", data, base + 16 + 16 * self.count + 8)
            self.files = base + after
        else:
            first = base + (24 if minor < 18 else 32)
            offsets = struct.unpack_from("<5Q", data, first)
            self.names, self.cutab, self.files, self.pctab, self.functab = (base + o for o in offsets)
            self.funcs = self.functab
        self.moduledata = self.find_moduledata()
        word = lambda offset: elf.u64(self.moduledata + offset)
        self.text = word(176) if minor >= 18 else 0
        self.gofunc = None
        if minor >= 18:
            self.gofunc = word(304 if minor < 20 else 320 if minor < 27 else 344)
        self.entries, self.offsets = [], []
        size, code = (16, "<QQ") if minor < 18 else (8, "<II")
        for i in range(self.count):
            entry, offset = struct.unpack_from(code, data, self.functab + size * i)
            self.entries.append(self.text + entry)
            self.offsets.append(self.funcs + offset)
        last, = struct.unpack_from(code[:2], data, self.functab + size * self.count)
        self.entries.append(self.text + last)

    def find_moduledata(self):
        data, needle = self.elf.data, struct.pack("<Q", self.address)
        for name in (".go.module", ".noptrdata", ".data"):
            if name not in self.elf.sections:
                continue
            address, offset, size = self.elf.sections[name]
            at = data.find(needle, offset, offset + size)
            while at >= 0:
                ftab = 24 if self.minor < 16 else 128
                functab, length = struct.unpack_from("<QQ", data, at + ftab)
                if functab == self.functab - self.base + self.address and length == self.count + 1:
                    return address + at - offset
                at = data.find(needle, at + 8, offset + size)
        raise SystemExit("no moduledata")

    def layout(self):
        """Offsets in _func: name, pcsp, pcfile, pcln, npcdata, cu, nfuncdata, size."""
        if self.minor < 16:
            return 8, 20, 24, 28, 32, None, 39, 40
        if self.minor < 18:
            return 8, 20, 24, 28, 32, 36, 43, 44
        if self.minor < 20:
            return 4, 16, 20, 24, 28, 32, 39, 40
        return 4, 16, 20, 24, 28, 32, 43, 44

    def field(self, i, offset):
        return struct.unpack_from("<I", self.elf.data, self.offsets[i] + offset)[0]

    def string(self, at):
        return self.elf.data[at:self.elf.data.index(b"\0", at)].decode("utf-8", "replace")

    def name(self, i):
        return self.string(self.names + self.field(i, self.layout()[0]))

    def values(self, i, table):
        """[(end, value)] of a pc-value table."""
        out, at, pc, value, first = [], self.pctab + table, self.entries[i], -1, True
        while True:
            delta, at = uvarint(self.elf.data, at)
            if delta == 0 and not first:
                return out
            first = False
            value += -(delta >> 1) - 1 if delta & 1 else delta >> 1
            advance, at = uvarint(self.elf.data, at)
            pc += advance * self.quantum
            out.append((pc, value))

    def lookup(self, i, offset, pc):
        for end, value in self.values(i, self.field(i, offset)):
            if pc < end:
                return value
        return None

    def position(self, i, pc):
        _, _, pcfile, pcln, _, cu, _, _ = self.layout()
        index = self.lookup(i, pcfile, pc)
        data = self.elf.data
        if cu is None:
            name, = struct.unpack_from("<I", data, self.files + 4 * index)
            file = self.string(self.base + name)
        else:
            entry, = struct.unpack_from("<I", data, self.cutab + 4 * (self.field(i, cu) + index))
            file = self.string(self.files + entry)
        return f"{file}:{self.lookup(i, pcln, pc)}"

    def open_defers(self, i):
        """(bits, slots, by bit) as bytes below varp; None if not open-coded."""
        if self.minor < 14:
            return None
        _, _, _, _, npcdata, _, nfuncdata, size = self.layout()
        index = 5 if self.minor < 16 else 4
        data = self.elf.data
        if data[self.offsets[i] + nfuncdata] <= index:
            return None
        start = self.offsets[i] + size + 4 * self.field(i, npcdata)
        if self.minor < 18:
            start += -(self.address + start - self.base) % 8
            pointer, = struct.unpack_from("<Q", data, start + 8 * index)
            if pointer == 0:
                return None
        else:
            offset, = struct.unpack_from("<I", data, start + 4 * index)
            if offset == 0xFFFFFFFF:
                return None
            pointer = self.gofunc + offset
        at = self.elf.at(pointer)

        def number():
            nonlocal at
            value, at = uvarint(data, at)
            return value

        if self.minor < 18:
            number()
        bits = number()
        if self.minor >= 22:
            first = number()
            return bits, [first - 8 * k for k in range(first // 8)]
        slots = []
        for _ in range(number()):
            if self.minor < 18:
                number()
            slots.append(number())
            if self.minor < 18:
                for _ in range(3 * number()):
                    number()
        return bits, slots[::-1]


def go_minor(data):
    at = data.find(b"\xff Go buildinf:")
    while at >= 0 and at % 16:
        at = data.find(b"\xff Go buildinf:", at + 1)
    if at >= 0 and data[at + 15] & 2:
        return int(re.match(rb"go1\.(\d+)", data[at + 33:at + 48]).group(1))
    elf = Elf(data)
    if ".go.buildinfo" in elf.sections:
        address, offset, _ = elf.sections[".go.buildinfo"]
        header = elf.u64(address + 16)
    else:
        header = elf.symbol("runtime.buildVersion")
    start = elf.at(elf.u64(header))
    return int(re.match(rb"go1\.(\d+)", data[start:start + 16]).group(1))


# address, mnemonic, operands; objdump prints raw bytes only without this flag.
LINE = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")
X86_STORE = re.compile(r"^(?:\$?[^,]+,)(-?0x[0-9a-f]+)?\(%rsp\)$")
X86_BYTE = {"al", "bl", "cl", "dl", "sil", "dil", "bpl"} | {f"r{n}b" for n in range(8, 16)}
ARM_CELL = re.compile(r"\[(sp|x27)(?:, #(-?\d+|0x[0-9a-f]+))?\]$")


class Code:
    """What objdump says of one binary, by function."""

    def __init__(self, elf, program):
        self.arm = elf.machine == 183
        if program is None:
            program = "aarch64-linux-gnu-objdump" if self.arm else "objdump"
        address, offset, size = elf.sections[".text"]
        out = subprocess.run(
            [program, "-d", "--no-show-raw-insn", "-w", "-j", ".text", sys.argv[1]],
            check=True, capture_output=True, text=True).stdout
        self.lines = []
        for line in out.splitlines():
            match = LINE.match(line)
            if match:
                text = match.group(3).split("//")[0].split("#")[0] if not self.arm else \
                    match.group(3).split("//")[0]
                self.lines.append((int(match.group(1), 16), match.group(2), text.strip()))
        self.addresses = [line[0] for line in self.lines]

    def between(self, start, end):
        first = bisect_right(self.addresses, start - 1)
        return self.lines[first:bisect_right(self.addresses, end - 1)]

    def call_target(self, mnemonic, operands):
        if mnemonic in ("call", "callq", "bl"):
            match = re.match(r"^(?:0x)?([0-9a-f]+)\b", operands)
            return int(match.group(1), 16) if match else None
        return None

    def stores(self, lines):
        """(pc, displacement from SP, size) of every store to the stack frame of general registers,
        vector zeroing included."""
        temporary = None
        for pc, mnemonic, operands in lines:
            if not self.arm:
                match = X86_STORE.match(operands)
                if match and mnemonic.startswith("mov") and not mnemonic.startswith(("movz", "movs")):
                    displacement = int(match.group(1) or "0", 16)
                    source = operands.split(",")[0].lstrip("%")
                    size = 16 if mnemonic.startswith(("movup", "movap", "movdq")) else \
                        1 if mnemonic == "movb" or source in X86_BYTE else \
                        8 if mnemonic == "movq" or source.startswith("r") and source[-1] not in "dwb" else 4
                    yield pc, displacement, size
                continue
            # Large displacements: add x27, sp, #imm{, lsl #12}; then [x27, #imm].
            match = re.match(r"^x27, (sp|x27), #(0x[0-9a-f]+|\d+)(?:, lsl #12)?$", operands)
            if mnemonic == "add" and match:
                amount = int(match.group(2), 0) << (12 if operands.endswith("lsl #12") else 0)
                temporary = amount + (temporary or 0 if match.group(1) == "x27" else 0)
                continue
            match = ARM_CELL.search(operands)
            if match and mnemonic in ("str", "strb", "stp", "stur", "sturb"):
                displacement = int(match.group(2) or "0", 0)
                if match.group(1) == "x27":
                    if temporary is None:
                        continue
                    displacement += temporary
                registers = operands[:match.start()].rstrip(", ").split(", ")
                if mnemonic.endswith("b"):
                    yield pc, displacement, 1
                elif registers[0].startswith("x"):
                    for k in range(len(registers)):
                        yield pc, displacement + 8 * k, 8


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--objdump")
    options = parser.parse_args()
    data = open(options.binary, "rb").read()
    elf = Elf(data)
    minor = go_minor(data)
    table = Table(elf, minor)
    code = Code(elf, options.objdump)
    wanted = {"runtime.deferproc": "heap", "runtime.deferprocStack": "stack",
              "runtime.deferprocat": "range-func"}
    targets = {table.entries[i]: wanted[table.name(i)]
               for i in range(table.count) if table.name(i) in wanted}

    def function_of(pc):
        return bisect_right(table.entries, pc) - 1

    for pc, mnemonic, operands in code.lines:
        mechanism = targets.get(code.call_target(mnemonic, operands))
        if mechanism:
            print(f"{pc:#x} {mechanism} - {table.position(function_of(pc), pc)}")
    for i in range(table.count):
        info = table.open_defers(i)
        if info is None:
            continue
        bits, slots = info
        print(f"declared {table.entries[i]:#x} {len(slots)}")
        depths = table.values(i, table.field(i, table.layout()[1]))
        lines = code.between(table.entries[i], table.entries[i + 1])
        begun = False
        for pc, displacement, size in code.stores(lines):
            depth = next((value for end, value in depths if pc < end), 0)
            key = depth - 8 - displacement
            if key == bits and size == 1:
                begun = True
            elif begun and size == 8 and key in slots:
                print(f"{pc:#x} open-coded {slots.index(key)} {table.position(i, pc)}")


main()
