//! Which directory entries decide what a path leads to: its symbolic links, and the file at their end.
//!
//! An editor renames a new file over the old; a Kubernetes ConfigMap is
//! `file → ..data/file`, `..data → ..2026_07_31/`, and swaps the link in the middle. Whoever watches all
//! these entries, by their directories, sees every such change, and none of the neighbours'.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// As many links as Linux itself follows in one path.
const LINKS_MAX: usize = 40;

/// The entries that decide, and the directories they are in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    entries: BTreeSet<PathBuf>,
    /// With device and inode: a directory made anew under its old name must be watched anew.
    pub(super) directories: BTreeMap<PathBuf, (u64, u64)>,
}

impl Places {
    /// Walks `path` (relative to the working directory) link by link. What is not there ends the walk: its
    /// directory is watched for it to come.
    pub(super) fn of(path: &Path) -> Self {
        let mut places = Self::default();
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let mut rest: VecDeque<OsString> = parts(&absolute);
        let mut here = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = rest.pop_front() {
            if part == ".." {
                here.pop();
                continue;
            }
            let entry = here.join(&part);
            match std::fs::symlink_metadata(&entry) {
                Ok(metadata) if metadata.is_symlink() && links < LINKS_MAX => {
                    links += 1;
                    places.add(&here, entry.clone());
                    let Ok(target) = std::fs::read_link(&entry) else { return places };
                    if target.is_absolute() {
                        here = PathBuf::from("/");
                    }
                    for part in parts(&target).into_iter().rev() {
                        rest.push_front(part);
                    }
                }
                Ok(_) if !rest.is_empty() => here = entry,
                Ok(_) | Err(_) => {
                    places.add(&here, entry);
                    return places;
                }
            }
        }
        places
    }

    /// Whether `path` is one of the entries.
    pub(super) fn concern(&self, path: &Path) -> bool {
        self.entries.contains(path)
    }

    fn add(&mut self, directory: &Path, entry: PathBuf) {
        self.entries.insert(entry);
        if let Ok(metadata) = std::fs::metadata(directory) {
            self.directories.insert(directory.to_owned(), (metadata.dev(), metadata.ino()));
        }
    }
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(part) => Some(part.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn real_directory() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(directory.path()).unwrap();
        (directory, path)
    }

    #[test]
    fn a_plain_file_is_its_own_entry() {
        let (_kept, directory) = real_directory();
        fs::write(directory.join("a.toml"), "").unwrap();
        let places = Places::of(&directory.join("a.toml"));
        assert!(places.concern(&directory.join("a.toml")) && !places.concern(&directory.join("b.toml")));
        assert_eq!(places.directories.keys().collect::<Vec<_>>(), [&directory]);
    }

    #[test]
    fn a_config_map_is_three_entries_in_two_directories() {
        let (_kept, directory) = real_directory();
        fs::create_dir(directory.join("..v1")).unwrap();
        fs::write(directory.join("..v1/a.toml"), "").unwrap();
        symlink("..v1", directory.join("..data")).unwrap();
        symlink("..data/a.toml", directory.join("a.toml")).unwrap();
        let places = Places::of(&directory.join("a.toml"));
        for entry in ["a.toml", "..data", "..v1/a.toml"] {
            assert!(places.concern(&directory.join(entry)), "{entry} in {places:?}");
        }
        assert_eq!(places.directories.len(), 2);
    }

    #[test]
    fn a_file_that_is_not_there_is_awaited_in_its_directory() {
        let (_kept, directory) = real_directory();
        let places = Places::of(&directory.join("later/a.toml"));
        assert!(places.concern(&directory.join("later")));
        symlink("round", directory.join("round")).unwrap();
        assert!(Places::of(&directory.join("round")).concern(&directory.join("round")));
    }
}
