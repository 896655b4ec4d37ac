//! Files of announced versions: existing files are linked, other files are fetched in parts into a temporary folder.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use policy::bundle::{Bundle, BundleFile, MANIFEST, plain_name};
use wire::{
    messages::{Announce, Fetch, FilePart},
    text::shown,
};

/// Maximum number of files in a bundle.
const MAX_FILES: usize = 64;
/// Maximum bytes of a file in a bundle.
const MAX_FILE_BYTES: u64 = 64 << 30;
/// Hexadecimal digits of a SHA-256.
const SHA256_DIGITS: usize = 64;
/// Maximum number of requests for a part before the version is rejected.
const MAX_ASKED: u32 = 6;

/// Reason why an announced version is not fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// The announce has no files or too many.
    #[error("it has {found} files, expected 1 to {MAX_FILES}")]
    Files {
        /// Number of announced files.
        found: usize,
    },
    /// The manifest is missing.
    #[error("its files lack `{MANIFEST}`")]
    NoManifest,
    /// A file name occurs twice.
    #[error("it names the file `{}` twice", shown(.0))]
    Twice(String),
    /// A digest is not a SHA-256.
    #[error(
        "the digest of its file `{}` is `{}`, expected {SHA256_DIGITS} digits 0-9 and a-f", shown(.name), shown(.found)
    )]
    Digest {
        /// Name of the file.
        name: String,
        /// The announced digest.
        found: String,
    },
    /// A file name has a path or is hidden.
    #[error("it names the file `{}`, expected a plain file name", shown(.0))]
    Name(String),
    /// A file is too large.
    #[error("its file `{name}` has {found} bytes, expected at most {MAX_FILE_BYTES}")]
    Bytes {
        /// Name of the file.
        name: String,
        /// The announced bytes.
        found: u64,
    },
    /// The learner does not send a part.
    #[error("a part of `{0}` was asked for {MAX_ASKED} times")]
    Silent(String),
    /// A part has a wrong length.
    #[error("the learner sent {found} bytes of `{name}` at {offset}, expected 1 to {expected}")]
    Part {
        /// Name of the file.
        name: String,
        /// Offset of the part in the file, in bytes.
        offset: u64,
        /// Bytes of the file from the offset on.
        expected: u64,
        /// Bytes in the part.
        found: usize,
    },
    /// A later version was announced.
    #[error("replaced by a later announce")]
    Replaced,
    /// A file operation failed.
    #[error("failed to {action} `{path}`")]
    Io {
        /// The attempted operation.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
}

/// A version that was not fetched.
#[derive(Debug)]
pub struct Failed {
    /// Number of the version.
    pub version: u64,
    /// Time of the announce.
    pub begun: Instant,
    /// Reason.
    pub error: IncomingError,
}

/// Progress of an announced version.
#[derive(Debug)]
pub enum Progress {
    /// No version is ready.
    Nothing,
    /// The live version has the same files as the announced one.
    Already {
        /// Number of the version.
        version: u64,
        /// Time of the announce.
        begun: Instant,
    },
    /// All files are complete.
    Fetched {
        /// Number of the version.
        version: u64,
        /// Time of the announce.
        begun: Instant,
        /// Folder of the bundle, not verified yet.
        dir: PathBuf,
        /// SHA-256 of every file by name, as announced.
        digests: BTreeMap<String, String>,
    },
    /// The version was rejected.
    Failed(Failed),
}

struct Part {
    file: File,
    entry: BundleFile,
    received: u64,
}

struct Fetching {
    announce: Announce,
    begun: Instant,
    beside: PathBuf,
    waiting: VecDeque<BundleFile>,
    current: Option<Part>,
    /// When the current part was requested; `None` before the request. `times` counts the requests for the part.
    asked: Option<Instant>,
    times: u32,
}

/// The folder of fetched bundles.
pub struct Incoming {
    dir: PathBuf,
    /// Complete files by SHA-256.
    known: BTreeMap<String, PathBuf>,
    announced: Option<(Announce, Instant)>,
    fetching: Option<Fetching>,
    /// Bundles that are kept: the live one and its predecessor.
    kept: VecDeque<PathBuf>,
}

/// Returns the SHA-256 of every announced file by name.
pub fn digests(announce: &Announce) -> BTreeMap<String, String> {
    announce
        .files
        .iter()
        .map(|f| (f.name.clone(), f.sha256.clone()))
        .collect()
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> IncomingError {
    let path = path.to_owned();
    move |source| IncomingError::Io { action, path, source }
}

fn remove(path: &Path) {
    if path.exists()
        && let Err(error) = fs::remove_dir_all(path)
    {
        tracing::warn!("failed to remove `{}`: {error}", path.display());
    }
}

impl Incoming {
    /// Uses `dir`, which belongs to this engine alone. Incomplete bundles of an earlier session are removed, complete ones are kept
    /// for their files.
    ///
    /// # Errors
    /// The folder cannot be created or listed.
    pub fn new(dir: &Path) -> std::io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut incoming = Self {
            dir: dir.to_owned(),
            known: BTreeMap::new(),
            announced: None,
            fetching: None,
            kept: VecDeque::new(),
        };
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            match Bundle::open(&path) {
                Ok(bundle) if !is_hidden(&path) => {
                    incoming.learn(&bundle);
                    incoming.kept.push_back(path);
                }
                _ => remove(&path),
            }
        }
        Ok(incoming)
    }

    /// Records the files of a bundle, which are then linked and not fetched again.
    pub fn learn(&mut self, bundle: &Bundle) {
        for file in &bundle.manifest.files {
            self.known.insert(file.sha256.clone(), bundle.path(&file.name));
        }
    }

    /// Accepts an announced version; the latest announce counts. Returns the incomplete version that the announce replaces, if any.
    pub fn announce(&mut self, announce: Announce) -> Option<Failed> {
        let same = |a: &Announce| a == &announce;
        if self.fetching.as_ref().is_some_and(|f| same(&f.announce))
            || self.announced.as_ref().is_some_and(|(a, _)| same(a))
        {
            return None;
        }
        let fetching = self.fetching.take().map(|f| {
            remove(&f.beside);
            (f.announce.version, f.begun)
        });
        let waiting = self
            .announced
            .replace((announce, Instant::now()))
            .map(|(a, begun)| (a.version, begun));
        fetching.or(waiting).map(|(version, begun)| Failed {
            version,
            begun,
            error: IncomingError::Replaced,
        })
    }

    /// Drops the current fetch after a lost connection; the learner announces the version again.
    pub fn abandon(&mut self) {
        self.announced = None;
        if let Some(fetching) = self.fetching.take() {
            remove(&fetching.beside);
        }
    }

    /// Starts an announced version, or completes a fetched one. `live` has the digests of the live version's files.
    pub fn advance(&mut self, live: Option<&BTreeMap<String, String>>) -> Progress {
        if let Some((announce, begun)) = self.announced.take() {
            if live == Some(&digests(&announce)) {
                return Progress::Already {
                    version: announce.version,
                    begun,
                };
            }
            let version = announce.version;
            match self.begin(announce, begun) {
                Ok(fetching) => self.fetching = Some(fetching),
                Err(error) => return Progress::Failed(Failed { version, begun, error }),
            }
        }
        match self.fetching.take() {
            Some(fetching) if fetching.current.is_none() && fetching.waiting.is_empty() => self.end(&fetching),
            other => {
                self.fetching = other;
                Progress::Nothing
            }
        }
    }

    fn begin(&self, announce: Announce, begun: Instant) -> Result<Fetching, IncomingError> {
        check(&announce)?;
        let beside = self.dir.join(format!(".v{}.fetching", announce.version));
        remove(&beside);
        fs::create_dir_all(&beside).map_err(io("create", &beside))?;
        let mut waiting = VecDeque::new();
        for entry in &announce.files {
            let here = self.known.get(&entry.sha256).filter(|path| path.is_file());
            // hard links do not cross file systems: the file is then fetched like a new one
            if here.is_none_or(|path| fs::hard_link(path, beside.join(&entry.name)).is_err()) {
                waiting.push_back(entry.clone());
            }
        }
        Ok(Fetching {
            announce,
            begun,
            beside,
            waiting,
            current: None,
            asked: None,
            times: 0,
        })
    }

    fn end(&mut self, fetching: &Fetching) -> Progress {
        let (version, begun) = (fetching.announce.version, fetching.begun);
        let digest = fetching
            .announce
            .files
            .iter()
            .find(|f| f.name == MANIFEST)
            .map(|f| f.sha256.as_str());
        let short = digest.and_then(|d| d.get(..8)).unwrap_or_default();
        let dir = self.dir.join(format!("v{version}-{short}"));
        remove(&dir);
        match fs::rename(&fetching.beside, &dir) {
            Ok(()) => Progress::Fetched {
                version,
                begun,
                dir,
                digests: digests(&fetching.announce),
            },
            Err(source) => {
                remove(&fetching.beside);
                Progress::Failed(Failed {
                    version,
                    begun,
                    error: io("rename a fetched bundle to", &dir)(source),
                })
            }
        }
    }

    /// Returns the part to request now; a part is returned once per request.
    pub fn wanted(&mut self) -> Option<Fetch> {
        let fetching = self.fetching.as_mut()?;
        if fetching.asked.is_some() {
            return None;
        }
        let (file, offset) = match (&fetching.current, fetching.waiting.front()) {
            (Some(part), _) => (part.entry.name.clone(), part.received),
            (None, Some(entry)) => (entry.name.clone(), 0),
            (None, None) => return None,
        };
        fetching.asked = Some(Instant::now());
        fetching.times += 1;
        Some(Fetch {
            version: fetching.announce.version,
            file,
            offset,
        })
    }

    /// Makes a part that did not arrive within `patience` due for another request.
    pub fn ask_again_after(&mut self, patience: Duration) {
        if let Some(fetching) = &mut self.fetching
            && fetching.asked.is_some_and(|asked| asked.elapsed() > patience)
        {
            fetching.asked = None;
        }
    }

    /// Accepts a part. A part that was not requested is ignored.
    ///
    /// # Errors
    /// The part has a wrong length, was requested too often, or cannot be written; the version is dropped.
    pub fn part(&mut self, part: &FilePart) -> Result<(), Failed> {
        let Some(fetching) = &mut self.fetching else {
            return Ok(());
        };
        if let Err(error) = fetching.write(part) {
            let failed = Failed {
                version: fetching.announce.version,
                begun: fetching.begun,
                error,
            };
            remove(&fetching.beside);
            self.fetching = None;
            return Err(failed);
        }
        Ok(())
    }

    /// Keeps a live bundle and its predecessor; removes older bundles.
    pub fn keep(&mut self, dir: &Path) {
        if let Ok(bundle) = Bundle::open(dir) {
            self.learn(&bundle);
        }
        self.kept.retain(|kept| kept != dir);
        self.kept.push_back(dir.to_owned());
        while self.kept.len() > 2 {
            if let Some(old) = self.kept.pop_front() {
                remove(&old);
            }
        }
        self.known.retain(|_, path| path.is_file());
    }

    /// Removes a rejected bundle. A local file may be damaged, so no file is linked until a version succeeds again.
    pub fn discard(&mut self, dir: &Path) {
        self.known.clear();
        remove(dir);
    }
}

impl Fetching {
    /// Writes a part. A part that was not requested is ignored.
    fn write(&mut self, part: &FilePart) -> Result<(), IncomingError> {
        if self.times > MAX_ASKED {
            return Err(IncomingError::Silent(part.file.clone()));
        }
        let (name, offset) = match (&self.current, self.waiting.front()) {
            (Some(current), _) => (current.entry.name.as_str(), current.received),
            (None, Some(entry)) => (entry.name.as_str(), 0),
            (None, None) => return Ok(()),
        };
        if part.version != self.announce.version || part.file != name || part.offset != offset {
            return Ok(());
        }
        let mut current = if let Some(current) = self.current.take() {
            current
        } else {
            let Some(entry) = self.waiting.pop_front() else {
                return Ok(());
            };
            let path = self.beside.join(&entry.name);
            let file = File::create(&path).map_err(io("create", &path))?;
            Part {
                file,
                entry,
                received: 0,
            }
        };
        let end = current.received + part.data.len() as u64;
        if (part.data.is_empty() && current.entry.bytes > 0) || end > current.entry.bytes {
            return Err(IncomingError::Part {
                name: part.file.clone(),
                offset: part.offset,
                expected: current.entry.bytes - current.received,
                found: part.data.len(),
            });
        }
        current
            .file
            .write_all(&part.data)
            .map_err(io("write", &self.beside.join(&current.entry.name)))?;
        current.received = end;
        self.asked = None;
        self.times = 0;
        if end < current.entry.bytes {
            self.current = Some(current);
        } else {
            current
                .file
                .sync_all()
                .map_err(io("sync", &self.beside.join(&current.entry.name)))?;
        }
        Ok(())
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name()
        .is_none_or(|name| name.to_string_lossy().starts_with('.'))
}

fn check(announce: &Announce) -> Result<(), IncomingError> {
    let found = announce.files.len();
    if found == 0 || found > MAX_FILES {
        return Err(IncomingError::Files { found });
    }
    if !announce.files.iter().any(|f| f.name == MANIFEST) {
        return Err(IncomingError::NoManifest);
    }
    let mut names = BTreeSet::new();
    for file in &announce.files {
        if !names.insert(&file.name) {
            return Err(IncomingError::Twice(file.name.clone()));
        }
        // the name becomes part of a path, and the digest is compared with the content
        let hexadecimal = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        if file.sha256.len() != SHA256_DIGITS || !file.sha256.chars().all(hexadecimal) {
            return Err(IncomingError::Digest {
                name: file.name.clone(),
                found: file.sha256.clone(),
            });
        }
        if !plain_name(&file.name) {
            return Err(IncomingError::Name(file.name.clone()));
        }
        if file.bytes > MAX_FILE_BYTES {
            return Err(IncomingError::Bytes {
                name: file.name.clone(),
                found: file.bytes,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, data: &[u8]) -> BundleFile {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join(name);
        fs::write(&path, data).expect("written");
        policy::bundle::describe_file(&path).expect("described")
    }

    fn announce(version: u64, files: Vec<BundleFile>) -> Announce {
        Announce { version, files }
    }

    /// Serves requested parts of three bytes until no part is requested.
    fn serve(incoming: &mut Incoming, files: &[(&str, &[u8])]) -> Vec<String> {
        let mut asked = Vec::new();
        while let Some(fetch) = incoming.wanted() {
            let (_, data) = files
                .iter()
                .find(|(name, _)| *name == fetch.file)
                .expect("an announced file");
            let rest = &data[fetch.offset as usize..];
            let data = rest[..rest.len().min(3)].to_vec();
            asked.push(fetch.file.clone());
            let part = FilePart {
                version: fetch.version,
                file: fetch.file,
                offset: fetch.offset,
                data,
            };
            incoming.part(&part).expect("taken");
            incoming.part(&part).expect("a repeated part is ignored");
        }
        asked
    }

    #[test]
    fn parts_become_files_and_known_files_are_linked() {
        let home = tempfile::tempdir().expect("folder");
        let mut incoming = Incoming::new(&home.path().join("incoming")).expect("made");
        let files: [(&str, &[u8]); 2] = [("manifest.json", b"{1}"), ("vlm", b"seven b")];
        assert!(
            incoming
                .announce(announce(1, files.iter().map(|(n, d)| entry(n, d)).collect()))
                .is_none()
        );
        assert!(matches!(incoming.advance(None), Progress::Nothing));
        assert_eq!(serve(&mut incoming, &files), ["manifest.json", "vlm", "vlm", "vlm"]);
        let Progress::Fetched { version: 1, dir, .. } = incoming.advance(None) else {
            panic!("whole")
        };
        for (name, data) in files {
            assert_eq!(fs::read(dir.join(name)).expect("there"), data);
        }
        // files of a kept bundle are not requested again
        incoming.known.insert(entry("vlm", b"seven b").sha256, dir.join("vlm"));
        incoming.announce(announce(
            2,
            vec![entry("manifest.json", b"{2}"), entry("vlm", b"seven b")],
        ));
        assert!(matches!(incoming.advance(None), Progress::Nothing));
        assert_eq!(serve(&mut incoming, &[("manifest.json", b"{2}")]), ["manifest.json"]);
        let Progress::Fetched { version: 2, dir, .. } = incoming.advance(None) else {
            panic!("whole")
        };
        assert_eq!(fs::read(dir.join("vlm")).expect("linked"), b"seven b");
    }

    #[test]
    fn the_live_version_is_not_fetched() {
        let home = tempfile::tempdir().expect("folder");
        let mut incoming = Incoming::new(&home.path().join("incoming")).expect("made");
        let wanted = announce(1, vec![entry("manifest.json", b"{1}")]);
        let live = digests(&wanted);
        incoming.announce(wanted);
        assert!(matches!(
            incoming.advance(Some(&live)),
            Progress::Already { version: 1, .. }
        ));
    }

    #[test]
    fn bad_announces_and_parts_are_refused_and_leave_nothing() {
        let home = tempfile::tempdir().expect("folder");
        let dir = home.path().join("incoming");
        let mut incoming = Incoming::new(&dir).expect("made");
        let named = |name: &str| BundleFile {
            name: name.to_owned(),
            bytes: 4,
            sha256: "0".repeat(64),
        };
        let digest = |sha256: &str| BundleFile {
            sha256: sha256.to_owned(),
            ..named("manifest.json")
        };
        let huge = BundleFile {
            bytes: u64::MAX,
            ..named("vlm")
        };
        for (files, reason) in [
            (vec![], "0 files"),
            (vec![named("vlm")], "lack `manifest.json`"),
            (vec![named("manifest.json"), named("../x")], "`../x`"),
            (vec![named("manifest.json"), huge], "bytes"),
            (vec![named("manifest.json"), named("manifest.json")], "twice"),
            (vec![digest("")], "digest"),
            (vec![digest("/../../x")], "digest"),
            (vec![digest(&"A".repeat(64))], "digest"),
            (vec![digest(&"0".repeat(63))], "digest"),
        ] {
            incoming.announce(announce(1, files));
            let Progress::Failed(failed) = incoming.advance(None) else {
                panic!("refused")
            };
            assert!(failed.error.to_string().contains(reason), "{}", failed.error);
        }
        for data in [vec![], vec![0; 5]] {
            incoming.announce(announce(1, vec![named("manifest.json")]));
            assert!(matches!(incoming.advance(None), Progress::Nothing));
            let fetch = incoming.wanted().expect("asked");
            let part = FilePart {
                version: 1,
                file: fetch.file,
                offset: 0,
                data,
            };
            assert!(
                incoming
                    .part(&part)
                    .expect_err("refused")
                    .error
                    .to_string()
                    .contains("expected 1 to 4")
            );
        }
        assert_eq!(fs::read_dir(&dir).expect("listed").count(), 0);
    }

    #[test]
    fn a_later_announce_replaces_an_earlier_one() {
        let home = tempfile::tempdir().expect("folder");
        let mut incoming = Incoming::new(&home.path().join("incoming")).expect("made");
        incoming.announce(announce(1, vec![entry("manifest.json", b"{1}")]));
        assert!(matches!(incoming.advance(None), Progress::Nothing));
        assert!(
            incoming
                .announce(announce(1, vec![entry("manifest.json", b"{1}")]))
                .is_none(),
            "the same one"
        );
        assert_eq!(
            incoming
                .announce(announce(2, vec![entry("manifest.json", b"{2}")]))
                .expect("replaced")
                .version,
            1
        );
        assert!(matches!(incoming.advance(None), Progress::Nothing));
        assert_eq!(incoming.wanted().expect("asked").version, 2);
    }
}
