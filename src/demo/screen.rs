//! Where the demo is shown: lines one after another, and on a terminal the numbers below them, in place.
//!
//! Plain ANSI: the view is erased by going up as many lines as it has, lines are written where it
//! stood, and it is written again below them, all in one write. So what happened scrolls as in any
//! program, and nothing is left behind but text. The cursor is hidden while there is a view and comes
//! back however the demo ends.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write};
use std::time::Duration;

use crate::demo::words::{self, View};

/// A view needs this much room, else the lines alone are shown.
const COLUMNS_MIN: usize = 50;
const ROWS_MIN: usize = 14;
/// Where text begins in a line: behind the time and who it is about.
const INDENT: usize = 20;
/// Assumed where a terminal does not say.
const COLUMNS: usize = 80;

const HIDE_CURSOR: &str = "\x1b[?25l";
const SHOW_CURSOR: &str = "\x1b[?25h";
const ERASE_BELOW: &str = "\x1b[J";

/// What can be shown where the output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surface {
    /// Bytes for a file, a pipe, a log.
    Lines,
    /// A terminal that gets lines only.
    Terminal {
        /// Whether they may be coloured.
        color: bool,
    },
    /// A terminal that can go up.
    Live {
        /// Whether it may be coloured.
        color: bool,
    },
}

/// How a piece of text is meant; colour says it again, never alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Tone {
    #[default]
    Plain,
    Dim,
    Good,
    Doubt,
    Bad,
    Strong,
}

/// A piece of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span(pub(super) Tone, pub(super) String);

impl Surface {
    /// What standard output can show. `plain` asks for lines.
    pub(super) fn of_stdout(plain: bool) -> Self {
        let said = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        // Logs asked for go to the same terminal and would run through the view.
        let logs = said(crate::telemetry::LOG_VARIABLE).is_some() && std::io::stderr().is_terminal();
        Self::choose(
            std::io::stdout().is_terminal(),
            plain || logs,
            said("TERM").is_none_or(|term| term == "dumb"),
            said("NO_COLOR").is_some(),
        )
    }

    fn choose(terminal: bool, plain: bool, dumb: bool, no_color: bool) -> Self {
        let color = !(dumb || no_color);
        match (terminal, plain || dumb) {
            (false, _) => Self::Lines,
            (true, true) => Self::Terminal { color: color && !plain },
            (true, false) => Self::Live { color },
        }
    }

    /// Somebody sits there.
    pub(super) fn is_terminal(self) -> bool {
        !matches!(self, Self::Lines)
    }

    fn color(self) -> bool {
        match self {
            Self::Lines => false,
            Self::Terminal { color } | Self::Live { color } => color,
        }
    }
}

/// The output.
pub(super) struct Screen {
    surface: Surface,
    out: Box<dyn Write + Send>,
    /// The numbers shown last; none before the first and after the end.
    view: Option<View>,
    /// Lines of it that stand on the terminal.
    drawn: usize,
    cursor_hidden: bool,
    unread: bool,
}

impl Screen {
    pub(super) fn new(surface: Surface, out: Box<dyn Write + Send>) -> Self {
        Self { surface, out, view: None, drawn: 0, cursor_hidden: false, unread: false }
    }

    /// The numbers can be kept in view.
    pub(super) fn is_live(&self) -> bool {
        matches!(self.surface, Surface::Live { .. })
    }

    /// Whoever read the output is gone.
    pub(super) fn is_unread(&self) -> bool {
        self.unread
    }

    /// What happened: when, to whom, what.
    pub(super) fn line(&mut self, at: Duration, who: &str, text: &str) {
        let columns = if self.surface.is_terminal() { size().0 } else { usize::MAX };
        let mut lines = String::new();
        for (nth, part) in wrap(text, columns.saturating_sub(INDENT)).iter().enumerate() {
            let spans = match nth {
                0 => vec![
                    Span(Tone::Dim, format!("{:>6.1} s  ", at.as_secs_f64())),
                    Span(words::tone_of(who), format!("{who:<9} ")),
                    Span(Tone::Plain, (*part).to_owned()),
                ],
                _ => vec![Span(Tone::Plain, format!("{:INDENT$}{part}", ""))],
            };
            lines += &render(&spans, usize::MAX, self.surface.color());
            lines.push('\n');
        }
        self.above_the_view(&lines);
    }

    /// Text as it is, several lines of it.
    pub(super) fn text(&mut self, text: &str) {
        self.above_the_view(text);
    }

    /// Shows these numbers in place of the ones before.
    pub(super) fn view(&mut self, view: &View) {
        self.view = Some(view.clone());
        self.above_the_view("");
    }

    /// The last words: the view goes, the cursor comes back.
    pub(super) fn finish(&mut self, text: &str) {
        self.view = None;
        self.surface = match self.surface {
            Surface::Live { color } => Surface::Terminal { color },
            other => other,
        };
        self.above_the_view(text);
    }

    fn above_the_view(&mut self, text: &str) {
        let mut frame = String::new();
        if self.drawn > 0 {
            let _infallible = write!(frame, "\r\x1b[{}A{ERASE_BELOW}", self.drawn);
            self.drawn = 0;
        }
        let (columns, rows) = size();
        let view = self.view.as_ref().filter(|_| columns >= COLUMNS_MIN && rows >= ROWS_MIN);
        if self.cursor_hidden != view.is_some() {
            self.cursor_hidden = view.is_some();
            frame += if self.cursor_hidden { HIDE_CURSOR } else { SHOW_CURSOR };
        }
        frame += text;
        if let Some(view) = view {
            for spans in view.lines() {
                // One column is left free: some terminals begin a new line when the last one is filled.
                frame += &render(&spans, columns - 1, self.surface.color());
                frame.push('\n');
                self.drawn += 1;
            }
        }
        self.write(&frame);
    }

    fn write(&mut self, text: &str) {
        if !self.unread {
            let written = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
            self.unread = written.is_err();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.cursor_hidden {
            self.write(SHOW_CURSOR);
        }
    }
}

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    match terminal_size::terminal_size() {
        Some((terminal_size::Width(columns), terminal_size::Height(rows))) => {
            (usize::from(columns), usize::from(rows))
        }
        None => (COLUMNS, usize::MAX),
    }
}

/// One line of at most `columns` characters.
fn render(spans: &[Span], columns: usize, color: bool) -> String {
    let mut line = String::new();
    let mut left = columns;
    for Span(tone, text) in spans {
        let text: String = text.chars().take(left).collect();
        left -= text.chars().count();
        let code = match tone {
            Tone::Plain => "",
            Tone::Dim => "2",
            Tone::Good => "32",
            Tone::Doubt => "33",
            Tone::Bad => "31",
            Tone::Strong => "1",
        };
        if color && !code.is_empty() && !text.is_empty() {
            let _infallible = write!(line, "\x1b[{code}m{text}\x1b[0m");
        } else {
            line += &text;
        }
    }
    line
}

/// Breaks `text` at spaces into lines of at most `columns`; a longer word has its line to itself.
fn wrap(text: &str, columns: usize) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while rest.chars().count() > columns.max(1) {
        // A space may be the first character that no longer fits.
        let fits = rest.char_indices().nth(columns.max(1)).map_or(rest.len(), |(at, _)| at);
        let beyond = rest[fits..].find(' ').map(|at| fits + at);
        let space = beyond.filter(|at| *at == fits).or_else(|| rest[..fits].rfind(' ').filter(|at| *at > 0));
        let Some(at) = space.or(beyond) else { break };
        let (line, after) = rest.split_at(at);
        lines.push(line);
        rest = after.trim_start();
    }
    lines.push(rest);
    lines
}

/// What was written, kept for a test.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct Kept(std::sync::Arc<parking_lot::Mutex<Vec<u8>>>);

#[cfg(test)]
impl Kept {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }
}

#[cfg(test)]
impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::demo::tally::Tally;
    use crate::policy::Moment;

    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn view() -> View {
        View { rows: Vec::new(), tally: Tally::default(), moved: 0, next: None, now: Moment::ZERO }
    }

    /// What a terminal shows of it: as many escapes understood as are written.
    fn shown(text: &str) -> Vec<String> {
        let mut lines = vec![String::new()];
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            rest = &rest[first.len_utf8()..];
            match first {
                '\n' => lines.push(String::new()),
                '\r' => {}
                '\x1b' => {
                    let end = rest.find(|c: char| c.is_ascii_alphabetic()).unwrap();
                    let (code, kind) = (&rest[1..end], &rest[end..=end]);
                    if kind == "A" {
                        let up: usize = code.parse().unwrap();
                        lines.truncate(lines.len() - up);
                        // Everything below is erased by what follows.
                        *lines.last_mut().unwrap() = String::new();
                    }
                    rest = &rest[end + 1..];
                }
                other => lines.last_mut().unwrap().push(other),
            }
        }
        lines
    }

    #[test]
    fn lines_scroll_above_the_view_and_nothing_of_it_is_left() {
        let kept = Kept::default();
        let mut screen = Screen::new(Surface::Live { color: true }, Box::new(kept.clone()));
        screen.text("opening\n");
        screen.view(&view());
        let height = view().lines().len();
        assert_eq!(shown(&kept.text()).len(), 1 + height + 1);
        screen.line(Duration::from_millis(1_500), words::DEMO, "one");
        screen.view(&view());
        screen.line(Duration::from_secs(12), words::EVERGATE, "two");
        let lines = shown(&kept.text());
        assert_eq!(lines.len(), 3 + height + 1);
        assert_eq!(lines[..3], ["opening", "   1.5 s  demo      one", "  12.0 s  evergate  two"]);
        screen.finish("verdict\n");
        assert_eq!(shown(&kept.text())[3..], ["verdict", ""]);
    }

    #[test]
    fn the_cursor_comes_back_however_it_ends() {
        for finished in [true, false] {
            let kept = Kept::default();
            let mut screen = Screen::new(Surface::Live { color: false }, Box::new(kept.clone()));
            screen.view(&view());
            assert!(kept.text().contains(HIDE_CURSOR) && !kept.text().contains(SHOW_CURSOR));
            if finished {
                screen.finish("");
            }
            drop(screen);
            assert_eq!(kept.text().matches(SHOW_CURSOR).count(), 1);
        }
    }

    #[test]
    fn lines_for_a_file_hold_no_escapes_and_are_not_broken() {
        let kept = Kept::default();
        let mut screen = Screen::new(Surface::Lines, Box::new(kept.clone()));
        screen.line(Duration::ZERO, words::CLIENTS, &"word ".repeat(100));
        assert_eq!(kept.text().lines().count(), 1);
        assert!(!kept.text().contains('\x1b'));
    }

    #[test]
    fn a_reader_that_left_is_noticed() {
        let mut screen = Screen::new(Surface::Lines, Box::new(Gone));
        assert!(!screen.is_unread());
        screen.text("anybody?");
        assert!(screen.is_unread());
    }

    #[test]
    fn lines_are_broken_at_spaces_and_lose_nothing() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("one", 80), ["one"]);
        assert_eq!(wrap("http://127.0.0.1:8080/ is long", 5), ["http://127.0.0.1:8080/", "is", "long"]);
        assert_eq!(wrap("", 5), [""]);
        assert_eq!(wrap("ö ü ä", 1), ["ö", "ü", "ä"]);
    }

    #[test]
    fn a_line_is_cut_at_the_width_whatever_its_colours() {
        let spans = [Span(Tone::Bad, "dead".to_owned()), Span(Tone::Plain, " long ago".to_owned())];
        assert_eq!(render(&spans, 6, false), "dead l");
        assert_eq!(render(&spans, 6, true), "\x1b[31mdead\x1b[0m l");
        assert_eq!(render(&spans, 2, true), "\x1b[31mde\x1b[0m");
    }

    #[test]
    fn only_a_terminal_that_can_go_up_gets_a_live_view() {
        assert_eq!(Surface::choose(false, false, false, false), Surface::Lines);
        assert_eq!(Surface::choose(true, true, false, false), Surface::Terminal { color: false });
        assert_eq!(Surface::choose(true, false, true, false), Surface::Terminal { color: false });
        assert_eq!(Surface::choose(true, false, false, true), Surface::Live { color: false });
        assert_eq!(Surface::choose(true, false, false, false), Surface::Live { color: true });
    }
}
