//! The key of the clients: read from a file that only its owner may read, compared in constant time.

use std::{
    fmt,
    fs::File,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Longest key in bytes.
const MAX_KEY_BYTES: usize = 1024;
/// Scheme of the header `Authorization`.
const SCHEME: &str = "Api-Key ";

/// A file that holds no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read.
    #[error("failed to read the key in `{path}` (`--api-key-file`)")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Other users may read or write the file.
    #[error("the key in `{path}` is open to other users: found mode {mode:04o}, expected 0600; run `chmod 600 {path}`")]
    Mode {
        /// Path of the file.
        path: PathBuf,
        /// Permissions of the file.
        mode: u32,
    },
    /// The file holds no key.
    #[error(
        "failed to read the key in `{path}`: found {found}, expected one line of 1 to {MAX_KEY_BYTES} visible ASCII characters"
    )]
    Form {
        /// Path of the file.
        path: PathBuf,
        /// What the file holds.
        found: &'static str,
    },
}

/// The key that clients send; only its digest is kept.
#[derive(Clone)]
pub(super) struct ApiKey([u8; 32]);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

impl ApiKey {
    /// Reads a key from a file that only its owner may read.
    pub(super) fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read {
            path: path.to_owned(),
            source,
        };
        let form = |found| KeyError::Form {
            path: path.to_owned(),
            found,
        };
        let file = File::open(path).map_err(failed)?;
        // of the opened file, which cannot be exchanged any more
        let metadata = file.metadata().map_err(failed)?;
        let mode = metadata.permissions().mode() & 0o7777;
        if !metadata.is_file() {
            return Err(form("no regular file"));
        }
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode {
                path: path.to_owned(),
                mode,
            });
        }
        let mut text = Vec::new();
        file.take(MAX_KEY_BYTES as u64 + 2)
            .read_to_end(&mut text)
            .map_err(failed)?;
        let key = text.strip_suffix(b"\n").unwrap_or(&text);
        let key = key.strip_suffix(b"\r").unwrap_or(key);
        match key {
            [] => Err(form("an empty file")),
            key if key.len() > MAX_KEY_BYTES => Err(form("a longer text")),
            key if !key.iter().all(u8::is_ascii_graphic) => Err(form("other characters")),
            key => Ok(Self(Sha256::digest(key).into())),
        }
    }

    /// Checks the value of the header `Authorization`; an error states what was found.
    pub(super) fn check(&self, header: Option<&[u8]>) -> Result<(), &'static str> {
        let header = header.ok_or("no such header")?;
        let key = header.strip_prefix(SCHEME.as_bytes()).ok_or("another scheme")?;
        let found: [u8; 32] = Sha256::digest(key).into();
        if bool::from(found.ct_eq(&self.0)) {
            Ok(())
        } else {
            Err("another key")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn a_key_is_read_from_a_private_file_only() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("key");
        let write = |text: &[u8], mode| {
            std::fs::write(&path, text).expect("writing");
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("mode");
            ApiKey::read(&path)
        };
        let key = write(b"secret\n", 0o600).expect("a key");
        assert_eq!(format!("{key:?}"), "ApiKey(..)");
        assert_eq!(key.check(Some(b"Api-Key secret")), Ok(()));
        for (header, found) in [
            (None, "no such header"),
            (Some(&b"Bearer secret"[..]), "another scheme"),
            (Some(b"Api-Key secre"), "another key"),
            (Some(b"Api-Key "), "another key"),
        ] {
            assert_eq!(key.check(header), Err(found));
        }
        for (text, mode, reason) in [
            (&b"secret"[..], 0o640, "found mode 0640"),
            (b"\n", 0o400, "an empty file"),
            (b"two\nlines", 0o600, "other characters"),
            (&[b'x'; 1025], 0o600, "a longer text"),
        ] {
            let error = write(text, mode).expect_err("rejected").to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(matches!(ApiKey::read(dir.path()), Err(KeyError::Form { .. })));
        assert!(matches!(
            ApiKey::read(&dir.path().join("none")),
            Err(KeyError::Read { .. })
        ));
    }
}
