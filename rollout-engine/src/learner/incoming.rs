//! Files of announced versions: what is here already is linked, the rest is fetched in parts into a folder beside.

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

/// Most files of a bundle.
const MAX_FILES: usize = 64;
/// Largest file of a bundle.
const MAX_FILE_BYTES: u64 = 64 << 30;
/// Digits of a SHA-256.
const SHA256_DIGITS: usize = 64;
/// Times that a part is asked for before the version is refused.
const MAX_ASKED: u32 = 6;

/// Why an announced version does not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// Too few or too many files.
    #[error("it has {found} files, expected 1 to {MAX_FILES}")]
    Files {
        /// Announced files.
        found: usize,
    },
    /// No manifest.
    #[error("its files lack `{MANIFEST}`")]
    NoManifest,
    /// A file is named twice.
    #[error("it names the file `{}` twice", shown(.0))]
    Twice(String),
    /// Not a SHA-256.
    #[error(
        "the digest of its file `{}` is `{}`, expected {SHA256_DIGITS} digits 0-9 and a-f", shown(.name), shown(.found)
    )]
    Digest {
        /// Which file.
        name: String,
        /// The announced digest.
        found: String,
    },
    /// A name that is a path, or hidden.
    #[error("it names the file `{}`, expected a plain file name", shown(.0))]
    Name(String),
    /// A file that is too large.
    #[error("its file `{name}` has {found} bytes, expected at most {MAX_FILE_BYTES}")]
    Bytes {
        /// Which file.
        name: String,
        /// The announced size.
        found: u64,
    },
    /// The learner does not send a part.
    #[error("a part of `{0}` was asked for {MAX_ASKED} times")]
    Silent(String),
    /// A part of another length.
    #[error("the learner sent {found} bytes of `{name}` at {offset}, expected 1 to {expected}")]
    Part {
        /// Which file.
        name: String,
        /// Where the part begins.
        offset: u64,
        /// Bytes that are missing from there.
        expected: u64,
        /// Bytes that were sent.
        found: usize,
    },
    /// A later version was announced.
    #[error("replaced by a later announce")]
    Replaced,
    /// A file operation failed.
    #[error("failed to {action} `{path}`")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// A version that did not arrive.
#[derive(Debug)]
pub struct Failed {
    /// Which one.
    pub version: u64,
    /// When it was announced.
    pub begun: Instant,
    /// Why.
    pub error: IncomingError,
}

/// What an announced version has come to.
#[derive(Debug)]
pub enum Progress {
    /// Nothing to do at the moment.
    Nothing,
    /// The live version is the announced one, file by file.
    Already {
        /// Which version.
        version: u64,
        /// When it was announced.
        begun: Instant,
    },
    /// All files are there.
    Fetched {
        /// Which version.
        version: u64,
        /// When it was announced.
        begun: Instant,
        /// The bundle's folder, not verified yet.
        dir: PathBuf,
        /// SHA-256 of every file, as announced.
        digests: BTreeMap<String, String>,
    },
    /// It cannot be had.
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
    /// When the present part was asked for, and how often; `None`: it is to be asked for.
    asked: Option<Instant>,
    times: u32,
}

/// The folder of fetched bundles.
pub struct Incoming {
    dir: PathBuf,
    /// Files that are here, by SHA-256.
    known: BTreeMap<String, PathBuf>,
    announced: Option<(Announce, Instant)>,
    fetching: Option<Fetching>,
    /// Bundles that stay: the live one and the one before.
    kept: VecDeque<PathBuf>,
}

/// SHA-256 of every announced file.
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
    /// Uses `dir`, which belongs to this engine alone: attempts of an earlier session are removed, its whole bundles are
    /// kept for their files.
    ///
    /// # Errors
    /// The folder cannot be made or listed.
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

    /// Remembers the files of a bundle, so that they need not be fetched.
    pub fn learn(&mut self, bundle: &Bundle) {
        for file in &bundle.manifest.files {
            self.known.insert(file.sha256.clone(), bundle.path(&file.name));
        }
    }

    /// A version is announced; the latest counts. Returns one that it replaces before it was there.
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

    /// The connection is lost: what was being fetched is dropped, the learner announces it again.
    pub fn abandon(&mut self) {
        self.announced = None;
        if let Some(fetching) = self.fetching.take() {
            remove(&fetching.beside);
        }
    }

    /// Begins an announced version, ends a fetched one. `live` are the digests of the live version's files.
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
            // another file system cannot be linked to: then the file is fetched like a new one
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

    /// The part to ask for now, once per part.
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

    /// A part that did not come for so long is asked for again.
    pub fn ask_again_after(&mut self, patience: Duration) {
        if let Some(fetching) = &mut self.fetching
            && fetching.asked.is_some_and(|asked| asked.elapsed() > patience)
        {
            fetching.asked = None;
        }
    }

    /// A part came. One that was not asked for is passed over.
    ///
    /// # Errors
    /// The version cannot be had: the learner does not have the file, or it cannot be written.
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

    /// A bundle is live: it and the one before stay, others go.
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

    /// A bundle was refused. One of its files may be damaged here, so nothing is linked again before the next success.
    pub fn discard(&mut self, dir: &Path) {
        self.known.clear();
        remove(dir);
    }
}

impl Fetching {
    /// Writes a part. One that was not asked for is passed over.
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
        // it becomes part of a path, and is what the content is compared with
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

    /// Serves what is wanted in parts of three bytes until nothing is.
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
            incoming.part(&part).expect("a repeated part is passed over");
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
        // what a kept bundle has is not asked for again
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
