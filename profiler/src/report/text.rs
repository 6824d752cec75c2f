//! Text for a terminal: cleaned of control characters, measured, shortened, numbers for people.

use std::borrow::Cow;

use unicode_width::UnicodeWidthChar;

/// What stands for a character that must not reach a terminal.
const REPLACEMENT: char = '\u{FFFD}';

/// `text` without anything that a terminal or an XML parser would act upon: control characters,
/// changes of writing direction, invisible characters, line separators.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if is_plain(text) || text.chars().all(is_harmless) {
        return Cow::Borrowed(text);
    }
    let safe = |c| if is_harmless(c) { c } else { REPLACEMENT };
    Cow::Owned(text.chars().map(safe).collect())
}

/// Whether it is of printable ASCII characters alone, as nearly all text is.
fn is_plain(text: &str) -> bool {
    // Without an early end, for the sake of the many bytes that can be looked at at once.
    let is_printable = |byte| matches!(byte, b' '..=b'~');
    text.bytes()
        .fold(true, |all, byte| all & is_printable(byte))
}

/// Whether a character is shown as itself wherever it stands.
pub(crate) fn is_harmless(c: char) -> bool {
    !c.is_control()
        && !matches!(c,
            '\u{AD}' | '\u{61C}' | '\u{180E}' | '\u{200B}'..='\u{200F}'
            | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FE00}'..='\u{FE0F}'
            | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E0FFF}')
        // Not characters at all, in any plane; XML forbids the first two.
        && u32::from(c) & 0xFFFE != 0xFFFE
}

/// How many columns cleaned text takes, at most.
pub(crate) fn width(text: &str) -> usize {
    if is_plain(text) {
        return text.len();
    }
    text.chars().map(columns).sum()
}

fn columns(c: char) -> usize {
    c.width().unwrap_or(0)
}

/// The end of `text` in at most `room` columns, an ellipsis in front if something is missing.
pub(crate) fn keep_end(text: &str, room: usize) -> Cow<'_, str> {
    if width(text) <= room {
        return Cow::Borrowed(text);
    }
    let Some(room) = room.checked_sub(1) else {
        return Cow::Borrowed("");
    };
    let start = text.len() - longest_end(text, room);
    Cow::Owned(format!("…{}", text.get(start..).unwrap_or_default()))
}

/// The beginning and the end of `text` in at most `room` columns, the end a little longer, an
/// ellipsis between.
pub(crate) fn keep_ends(text: &str, room: usize) -> Cow<'_, str> {
    if width(text) <= room {
        return Cow::Borrowed(text);
    }
    let Some(room) = room.checked_sub(1) else {
        return Cow::Borrowed("");
    };
    let head = longest(text.chars(), room * 2 / 5);
    let head = text.get(..head).unwrap_or_default();
    let tail = longest_end(text, room - width(head));
    let tail = text.get(text.len() - tail..).unwrap_or_default();
    Cow::Owned(format!("{head}…{tail}"))
}

/// How many bytes at the end of `text` fit in `room` columns.
fn longest_end(text: &str, room: usize) -> usize {
    if is_plain(text) {
        return text.len().min(room);
    }
    longest(text.chars().rev(), room)
}

/// How many bytes of the characters fit in `room` columns.
fn longest(chars: impl Iterator<Item = char>, room: usize) -> usize {
    let mut used = 0;
    chars
        .take_while(|&c| {
            used += columns(c);
            used <= room
        })
        .map(char::len_utf8)
        .sum()
}

/// A function's name in at most `room` columns: first without the directories of its package
/// (`…/http.(*conn).serve`), then by its ends.
pub(crate) fn short_function(name: &str, room: usize) -> Cow<'_, str> {
    if width(name) <= room {
        return Cow::Borrowed(name);
    }
    // The package's path ends before type arguments, which have slashes of their own.
    let generic = name.find('[').unwrap_or(name.len());
    let path = name.get(..generic).unwrap_or(name);
    if let Some(rest) = from_slash(name, path.len(), room) {
        return Cow::Owned(format!("…{rest}"));
    }
    let start = path.rfind('/').map_or(0, |slash| slash + 1);
    keep_ends(name.get(start..).unwrap_or(name), room)
}

/// A path in at most `room` columns: as many last directories as fit, at least the file's end.
pub(crate) fn short_path(path: &str, room: usize) -> Cow<'_, str> {
    if width(path) <= room {
        return Cow::Borrowed(path);
    }
    if let Some(rest) = from_slash(path, path.len(), room) {
        return Cow::Owned(format!("…{rest}"));
    }
    keep_end(file_name(path), room)
}

/// The longest end of `text` that starts with a slash before byte `end` and leaves room for an
/// ellipsis.
fn from_slash(text: &str, end: usize, room: usize) -> Option<&str> {
    let start = text.len() - longest_end(text, room.checked_sub(1)?);
    let slash = text.get(start..end)?.find('/')?;
    text.get(start + slash..)
}

/// What follows the last slash.
pub(crate) fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Words in lines of at most `room` columns; a word that is longer is shortened by its ends.
pub(crate) fn wrap(words: &str, room: usize) -> Vec<String> {
    join(words.split_whitespace(), " ", room)
}

/// Parts in lines of at most `room` columns, `separator` between those on one line.
pub(crate) fn join<S: AsRef<str>>(
    parts: impl IntoIterator<Item = S>,
    separator: &str,
    room: usize,
) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in parts {
        let part = keep_ends(part.as_ref(), room);
        match lines.last_mut() {
            Some(line) if width(line) + width(separator) + width(&part) <= room => {
                line.push_str(separator);
                line.push_str(&part);
            }
            _ => lines.push(part.into_owned()),
        }
    }
    lines
}

/// A count with three digits and a decimal prefix: `999`, `12.3 k`, `1.23 M`.
pub(crate) fn count(n: u64) -> String {
    if n < 1000 {
        return n.to_string();
    }
    scaled(n as f64)
}

/// A rate, which may have a fraction: `0.25`, `12.3`, `1.23 k`.
pub(crate) fn rate(n: f64) -> String {
    if n == 0.0 {
        return "0".to_owned();
    }
    if n < 0.01 {
        return "<0.01".to_owned();
    }
    scaled(n)
}

fn scaled(n: f64) -> String {
    let prefixes = ["", " k", " M", " G", " T", " P", " E"];
    let mut value = n;
    let mut prefixes = prefixes.into_iter();
    let mut prefix = prefixes.next().unwrap_or_default();
    while value >= 999.5 {
        let Some(next) = prefixes.next() else {
            return format!("{value:.0}{prefix}");
        };
        (value, prefix) = (value / 1000.0, next);
    }
    format!("{}{prefix}", three_digits(value))
}

/// A time in ns: `12 ns`, `1.23 µs`, `45.6 ms`, `2.5 s`.
pub(crate) fn time(ns: f64) -> String {
    let units = [" ns", " µs", " ms", " s"];
    let mut value = ns;
    let mut units = units.into_iter();
    let mut unit = units.next().unwrap_or_default();
    while value >= 999.5 {
        let Some(next) = units.next() else {
            return format!("{}{unit}", count(value as u64));
        };
        (value, unit) = (value / 1000.0, next);
    }
    if value == 0.0 {
        return format!("0{unit}");
    }
    format!("{}{unit}", three_digits(value))
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// A share of a whole in percent: `61.2 %`, `<0.1 %`. Nothing of nothing is 0 %.
pub(crate) fn share(part: f64, whole: f64) -> String {
    let percent = if whole > 0.0 {
        part / whole * 100.0
    } else {
        0.0
    };
    match percent {
        0.0 => "0 %".to_owned(),
        p if p < 0.1 => "<0.1 %".to_owned(),
        p if p >= 99.95 => format!("{p:.0} %"),
        p => format!("{p:.1} %"),
    }
}

/// `1 site`, `2 sites`, `12,345 sites`.
pub(crate) fn plural(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", grouped(n), if n == 1 { one } else { many })
}

/// An exact number with commas.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1.00 k");
        assert_eq!(count(999_499), "999 k");
        assert_eq!(count(999_500), "1.00 M");
        assert_eq!(count(u64::MAX), "18.4 E");
        assert_eq!(rate(0.25), "0.25");
        assert_eq!(rate(0.001), "<0.01");
        assert_eq!(time(0.0), "0 ns");
        assert_eq!(time(12.34), "12.3 ns");
        assert_eq!(time(1_234.0), "1.23 µs");
        assert_eq!(time(2.5e9), "2.50 s");
        assert_eq!(time(7.2e13), "72.0 k s");
        assert_eq!(share(1.0, 3.0), "33.3 %");
        assert_eq!(share(1.0, 1.0), "100 %");
        assert_eq!(share(1.0, 1e6), "<0.1 %");
        assert_eq!(share(0.0, 0.0), "0 %");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }

    #[test]
    fn nothing_that_a_terminal_acts_upon_gets_through() {
        assert_eq!(
            clean("a\x1b[31mb\u{9b}c\n"),
            "a\u{FFFD}[31mb\u{FFFD}c\u{FFFD}"
        );
        assert_eq!(clean("user\u{202E}gpj.exe"), "user\u{FFFD}gpj.exe");
        assert_eq!(clean("main.(*Größe).表示"), "main.(*Größe).表示");
    }

    #[test]
    fn functions_lose_their_package_path_first() {
        let name = "github.com/acme/api/internal/server.(*Conn).serve";
        assert_eq!(short_function(name, 49), name);
        assert_eq!(short_function(name, 34), "…/internal/server.(*Conn).serve");
        assert_eq!(short_function(name, 23), "…/server.(*Conn).serve");
        assert_eq!(short_function(name, 15), "serve…nn).serve");
        let generic = "a.com/x/list.Each[go.shape.struct { a.com/y.T }]";
        assert_eq!(
            short_function(generic, 46),
            "…/x/list.Each[go.shape.struct { a.com/y.T }]"
        );
    }

    #[test]
    fn paths_keep_their_end() {
        assert_eq!(
            short_path("/usr/lib/go/src/net/http/server.go:1234", 22),
            "…/http/server.go:1234"
        );
        assert_eq!(short_path("/usr/src/server.go:1234", 8), "…go:1234");
        assert_eq!(short_path("x.go", 0), "");
    }
}
