//! The decoders against objdump, over all the code of a fixture: boundaries, branch targets, what
//! the kernel emulates, stores to the stack, and that no written register is overlooked.

use std::collections::HashMap;
use std::process::Command;

use deferprof_fixtures::{Arch, Build, Fixture, Toolchain};

use super::{Flow, Instruction, Op, Operand, Place};
use crate::plan::InstructionKind;
use crate::{Architecture, Binary};

/// Mnemonic and operands by address.
type Listing = HashMap<u64, (String, String)>;

/// Decodes every function of a fixture; `None` where the tools are not here.
fn code(arch: Arch, objdump: &str) -> Option<(Vec<Instruction>, Listing)> {
    let toolchain = Toolchain::newest().ok()?;
    let fixture = Fixture::find("conditionals").unwrap();
    let path = fixture.build(&toolchain, &Build::arch(arch)).unwrap();
    let Ok(output) = Command::new(objdump)
        .args(["-d", "--no-show-raw-insn", "-w", "-j", ".text"])
        .arg(&path)
        .output()
    else {
        println!("skipped: there is no {objdump} here");
        return None;
    };
    let mut listing = Listing::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let mut columns = line.splitn(3, '\t');
        let address = columns.next().and_then(|c| c.trim().strip_suffix(':'));
        let Some(address) = address.and_then(|a| u64::from_str_radix(a, 16).ok()) else {
            continue;
        };
        let mnemonic = columns.next().unwrap_or_default().trim();
        let (mnemonic, rest) = mnemonic.split_once(' ').unwrap_or((mnemonic, ""));
        let operands = columns.next().unwrap_or(rest).trim();
        listing.insert(address, (mnemonic.to_owned(), operands.to_owned()));
    }
    let bytes = std::fs::read(path).unwrap();
    let binary = Binary::parse(&bytes).unwrap();
    let (image, module) = binary.parts();
    let mut instructions = Vec::new();
    for index in 0..module.table.count {
        let func = module.table.func(image, index).unwrap();
        // Enough code, with little assembly (which holds what Go's compiler does not make).
        let name = module.table.name(func).unwrap();
        let wanted: [&[u8]; 8] = [
            b"main.",
            b"fmt.",
            b"os.",
            b"reflect.",
            b"strconv.",
            b"encoding",
            b"time.",
            b"runtime.",
        ];
        if wanted.iter().any(|prefix| name.starts_with(prefix)) {
            let len = func.end.offset_from(func.entry).unwrap();
            let code = image.read(func.entry, len).unwrap();
            super::function(image.architecture, func.entry, code, &mut instructions);
        }
    }
    let sizes = (instructions.len(), listing.len());
    assert!(sizes.0 > 5_000 && sizes.1 > 5_000, "{sizes:?}");
    Some((instructions, listing))
}

/// The hexadecimal number that an operand list ends with, before objdump's `<symbol>`.
fn target(operands: &str) -> Option<u64> {
    let operand = operands.split('<').next()?.trim();
    let operand = operand.rsplit(',').next()?.trim().trim_start_matches("0x");
    u64::from_str_radix(operand, 16).ok()
}

fn arm64_register(text: &str) -> Option<u8> {
    let number = text.trim().strip_prefix(['x', 'w'])?.parse().ok()?;
    (number < 31).then_some(number)
}

#[test]
fn arm64_agrees() {
    let Some((instructions, listing)) = code(Arch::Arm64, "aarch64-linux-gnu-objdump") else {
        return;
    };
    let mut compared = 0;
    for i in &instructions {
        let Some((mnemonic, operands)) = listing.get(&i.address.0) else {
            continue;
        };
        let at = format!("{}: {mnemonic} {operands}: {i:?}", i.address);
        let first = operands.split(',').next().unwrap_or_default();
        let flow = match mnemonic.as_str() {
            "b" => Flow::Jump(crate::VirtualAddress(target(operands).unwrap())),
            "bl" => Flow::Call(crate::VirtualAddress(target(operands).unwrap())),
            "cbz" | "cbnz" | "tbz" | "tbnz" => {
                Flow::Branch(crate::VirtualAddress(target(operands).unwrap()))
            }
            m if m.starts_with("b.") => {
                Flow::Branch(crate::VirtualAddress(target(operands).unwrap()))
            }
            "br" => Flow::IndirectJump,
            "blr" => Flow::IndirectCall,
            "ret" => Flow::Return,
            "brk" | "hlt" | "udf" | ".inst" | ".word" => Flow::Stop,
            _ => Flow::Next,
        };
        if mnemonic == ".inst" || mnemonic == ".word" || mnemonic == "udf" {
            continue;
        }
        assert_eq!(i.flow, flow, "{at}");
        let emulated = !matches!(flow, Flow::Next | Flow::Stop) || mnemonic.starts_with("adr");
        assert_eq!(i.kind.is_emulated(), emulated, "{at}");
        compared += 1;
        let store = mnemonic.starts_with("st");
        if let (
            Op::Store {
                to: Place::Stack(d),
                ..
            },
            true,
        ) = (i.op, store)
        {
            assert!(operands.contains("[sp"), "{at}");
            let written = operands.split("[sp").nth(1).unwrap_or_default();
            let number = written.trim_matches([']', ',', ' ', '#']);
            assert_eq!(number.parse().unwrap_or(0), d, "{at}");
        } else if store
            && operands.ends_with(']')
            && operands.contains("[sp")
            && !operands.contains("[sp, x")
        {
            panic!("{at}: a store to the stack that was not recognised");
        }
        let names_no_target = store
            || matches!(flow, Flow::Branch(_) | Flow::Jump(_) | Flow::Call(_))
            || [
                "cmp", "cmn", "tst", "ccmp", "ccmn", "prfm", "msr", "dmb", "br", "blr", "ret",
            ]
            .contains(&mnemonic.as_str());
        if !names_no_target && let Some(register) = arm64_register(first) {
            let known = i.op.written() == Some(register) || i.clobbers >> register & 1 == 1;
            assert!(known, "{at}: x{register} is written");
            if register == 27 {
                assert!(!i.probeable, "{at}: a restartable sequence");
            }
        }
    }
    assert!(compared > 5_000, "{compared}");
    println!("{compared} instructions agree");
}

#[test]
fn amd64_agrees() {
    let Some((instructions, listing)) = code(Arch::Amd64, "objdump") else {
        return;
    };
    let mut compared = 0;
    for i in &instructions {
        let Some((mnemonic, operands)) = listing.get(&i.address.0) else {
            panic!("{}: objdump has no instruction there: {i:?}", i.address);
        };
        let at = format!("{}: {mnemonic} {operands}: {i:?}", i.address);
        let address = || crate::VirtualAddress(target(operands).unwrap());
        let indirect = operands.starts_with('*');
        let flow = match mnemonic.as_str() {
            "jmp" if indirect => Flow::IndirectJump,
            "call" if indirect => Flow::IndirectCall,
            "jmp" => Flow::Jump(address()),
            "call" => Flow::Call(address()),
            "ret" => Flow::Return,
            "int" | "int3" | "ud2" | "(bad)" => Flow::Stop,
            m if m.starts_with('j') => Flow::Branch(address()),
            _ => Flow::Next,
        };
        assert_eq!(i.flow, flow, "{at}");
        let push = mnemonic == "push" && operands.starts_with('%');
        let one_byte_nop = mnemonic == "nop" && operands.is_empty();
        let direct = matches!(flow, Flow::Jump(_) | Flow::Call(_) | Flow::Branch(_));
        assert_eq!(
            i.kind != InstructionKind::SingleStepped,
            direct || push || one_byte_nop,
            "{at}"
        );
        compared += 1;
        // mov to the stack, without an index
        let last = operands.rsplit_once(',').map_or("", |(_, last)| last);
        if mnemonic.starts_with("mov") && last.ends_with("(%rsp)") {
            let number = last.trim_end_matches("(%rsp)").trim_start_matches("0x");
            let expected = i64::from_str_radix(number, 16).unwrap_or(0);
            let Op::Store {
                to, values, size, ..
            } = i.op
            else {
                panic!("{at}: a store to the stack that was not recognised");
            };
            assert_eq!(to, Place::Stack(expected), "{at}");
            let source = operands
                .trim_start_matches('%')
                .split(',')
                .next()
                .unwrap_or_default();
            if mnemonic == "mov" && size == 8 && source.starts_with('r') {
                assert!(matches!(values[0], Operand::Register(_)), "{at}");
            }
        }
    }
    assert!(compared > 5_000, "{compared}");
    println!("{compared} instructions agree");
    assert_eq!(Architecture::Amd64.conventions().g, 14);
}
