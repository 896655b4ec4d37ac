//! Log lines on standard error: limited per place in the code and time window, with a count of omitted lines. Texts of peers are
//! escaped and cut, so that no peer can forge a line or fill a disk.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    io::IsTerminal,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use policy::message::shown;
use tracing::{Event, Level, Subscriber, callsite::Identifier};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// Lines that one place in the code may log per [`WINDOW`]. Levels `debug` and `trace`, which are off by default, are not limited.
const LINES: u32 = 10;
/// Length of the time window of [`LINES`].
const WINDOW: Duration = Duration::from_secs(10);
/// Most characters of a line.
const LINE_CHARS: usize = 1000;

/// Starts logging. `RUST_LOG` selects the levels (default: `info`).
pub fn start() {
    let limit = Arc::new(Limit::default());
    let lines = Lines {
        limit: Arc::clone(&limit),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new("info"));
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(lines)
        // a line that fails to be written, as on a full disk, is dropped: an error message on the same stream would end the process
        .log_internal_errors(false);
    tracing_subscriber::registry().with(filter).with(layer).init();
    let reporting = thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || report(&limit));
    if let Err(error) = reporting {
        tracing::warn!("counts of lines that are left out come late: {error}");
    }
}

/// Logs the counts of omitted lines once per [`WINDOW`].
#[expect(clippy::infinite_loop, reason = "it lives as long as the process")]
fn report(limit: &Limit) {
    loop {
        thread::park_timeout(WINDOW);
        for (count, text) in limit.left_out() {
            tracing::info!("{count} more lines were left out: {text}");
        }
    }
}

/// Lines of one place in the code.
#[derive(Debug)]
struct Site {
    since: Instant,
    lines: u32,
    left_out: u64,
    /// Last written line.
    text: String,
}

#[derive(Debug, Default)]
struct Limit(Mutex<HashMap<Identifier, Site>>);

impl Limit {
    fn lock(&self) -> MutexGuard<'_, HashMap<Identifier, Site>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a line. Returns the number of lines omitted since the last written one, or `None` if this line is omitted.
    fn admit(&self, place: Identifier, now: Instant) -> Option<u64> {
        let mut sites = self.lock();
        let site = sites.entry(place).or_insert_with(|| Site {
            since: now,
            lines: 0,
            left_out: 0,
            text: String::new(),
        });
        if now.duration_since(site.since) >= WINDOW {
            site.since = now;
            site.lines = 0;
        }
        if site.lines == LINES {
            site.left_out += 1;
            return None;
        }
        site.lines += 1;
        Some(std::mem::take(&mut site.left_out))
    }

    fn written(&self, place: Identifier, text: &str) {
        if let Some(site) = self.lock().get_mut(&place) {
            text.clone_into(&mut site.text);
        }
    }

    /// Returns and resets the nonzero counts of all places, each with its last written line.
    fn left_out(&self) -> Vec<(u64, String)> {
        let mut sites = self.lock();
        sites
            .values_mut()
            .filter(|site| site.left_out > 0)
            .map(|site| (std::mem::take(&mut site.left_out), site.text.clone()))
            .collect()
    }
}

struct Lines {
    limit: Arc<Limit>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let (level, place) = (*metadata.level(), metadata.callsite());
        let limited = level <= Level::INFO;
        let left_out = if limited {
            match self.limit.admit(place.clone(), Instant::now()) {
                Some(count) => count,
                None => return Ok(()),
            }
        } else {
            0
        };
        let mut text = String::new();
        ctx.field_format().format_fields(Writer::new(&mut text), event)?;
        let mut line = shown(&text, LINE_CHARS);
        if limited {
            self.limit.written(place, &line);
        }
        if left_out > 0 {
            write!(line, " ({left_out} more like this were left out)")?;
        }
        SystemTime.format_time(&mut writer)?;
        let colour = match level {
            Level::ERROR => "31",
            Level::WARN => "33",
            Level::INFO => "32",
            _ => "34",
        };
        if writer.has_ansi_escapes() {
            writeln!(writer, " \u{1b}[{colour}m{level:>5}\u{1b}[0m {line}")
        } else {
            writeln!(writer, " {level:>5} {line}")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("sound").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Written {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    fn logged(work: impl FnOnce()) -> (String, Arc<Limit>) {
        let (written, limit) = (Written::default(), Arc::new(Limit::default()));
        let lines = Lines {
            limit: Arc::clone(&limit),
        };
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(written.clone())
            .event_format(lines);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        let bytes = written.0.lock().expect("sound").clone();
        (String::from_utf8(bytes).expect("text"), limit)
    }

    #[test]
    fn a_flood_of_one_reason_is_counted_and_leaves_others_alone() {
        let (text, limit) = logged(|| {
            for number in 0..5000 {
                tracing::warn!("junk {number}");
            }
            tracing::warn!("another reason");
        });
        assert_eq!(
            text.lines().filter(|line| line.contains("junk")).count(),
            LINES as usize
        );
        assert!(text.contains("another reason"));
        assert_eq!(limit.left_out(), [(4990, "junk 9".to_owned())]);
        assert!(limit.left_out().is_empty(), "reported once");
    }

    #[test]
    fn a_new_window_writes_again_and_says_what_was_left_out() {
        let limit = Limit::default();
        let place = {
            let mut found = None;
            let (_, seen) = logged(|| tracing::info!("one"));
            if let Some(id) = seen.lock().keys().next() {
                found = Some(id.clone());
            }
            found.expect("a place")
        };
        let begun = Instant::now();
        for _ in 0..LINES {
            assert_eq!(limit.admit(place.clone(), begun), Some(0));
        }
        assert_eq!(limit.admit(place.clone(), begun), None);
        assert_eq!(limit.admit(place.clone(), begun), None);
        assert_eq!(limit.admit(place, begun + WINDOW), Some(2));
    }

    /// Environment variable that is set in the process that logs to a full disk.
    const FULL: &str = "PIRL_TEST_FULL";

    /// Runs as the program that logs when [`FULL`] is set; does nothing otherwise.
    #[test]
    fn logging_program() {
        if std::env::var_os(FULL).is_some() {
            start();
            tracing::error!("nobody reads this");
        }
    }

    #[test]
    fn a_full_disk_ends_no_process() {
        let full = std::fs::File::create("/dev/full").expect("a device that is always full");
        let own = std::env::current_exe().expect("own path");
        let status = std::process::Command::new(own)
            .args(["--exact", "log::tests::logging_program", "--nocapture"])
            .env(FULL, "1")
            .stdout(std::process::Stdio::null())
            .stderr(full)
            .status();
        assert!(status.expect("starting this test again").success());
    }

    #[test]
    fn texts_of_peers_cannot_forge_or_flood_a_line() {
        let (text, _) = logged(|| {
            tracing::warn!(
                "worker `{}`",
                format!("x\n2026 ERROR forged\u{1b}[2J{}", "y".repeat(1 << 20))
            );
        });
        let line = text.strip_suffix('\n').expect("a line");
        assert!(
            line.contains("x\\n2026 ERROR forged") && !line.contains(char::is_control),
            "{line}"
        );
        assert!(line.chars().count() < LINE_CHARS + 50, "{}", line.len());
    }
}
