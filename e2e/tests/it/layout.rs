//! No circles between the files of a crate in `federation/`.
//!
//! Each file is a module. A module uses another one when a path in it, after imports and re-exports are followed, names an item
//! that is defined there. Modules that use each other, directly or through others, are a circle: none of them can be read,
//! tested or moved alone. Declaring a child module and re-exporting its items is not a use, so a parent and its child are a
//! circle only if each uses items of the other. Code in modules of tests does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

type Module = Vec<String>;

/// One file, with the paths in it.
#[derive(Default)]
struct File {
    /// The targets of names, as absolute paths: imports.
    imports: BTreeMap<String, Module>,
    /// Those that other modules may use from here.
    exports: BTreeMap<String, Module>,
    /// All paths outside of re-exports, as written.
    paths: Vec<Module>,
}

struct Crate {
    files: BTreeMap<Module, File>,
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().expect("a folder of sources").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|it| it == "rs") && path.file_name().is_none_or(|it| it != "tests.rs") {
            files.push(path);
        }
    }
}

fn module_of(path: &Path) -> Module {
    let mut module: Module = path.with_extension("").iter().map(|it| it.to_string_lossy().into_owned()).collect();
    if matches!(module.last().map(String::as_str), Some("lib" | "main")) {
        module.pop();
    }
    module
}

impl Crate {
    fn read(folder: &Path) -> Self {
        let source = folder.join("src");
        let mut paths = Vec::new();
        sources(&source, &mut paths);
        let has_library = source.join("lib.rs").exists();
        let paths = paths.into_iter().filter(|path| !has_library || *path != source.join("main.rs"));
        let mut files: BTreeMap<Module, File> = BTreeMap::new();
        for path in paths {
            let text = std::fs::read_to_string(&path).expect("a source");
            let tokens = TokenStream::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let module = module_of(path.strip_prefix(&source).expect("below it"));
            files.insert(module.clone(), File::read(tokens, &module));
        }
        Self { files }
    }

    /// The module that defines what a path of `module` names, if it is one of this crate.
    fn target(&self, module: &Module, path: &Module) -> Option<Module> {
        let file = &self.files[module];
        let mut absolute = match path.first()?.as_str() {
            "crate" | "self" | "super" => absolute(module, path)?,
            first => {
                let start = file.imports.get(first).cloned();
                let start = start.unwrap_or_else(|| module.iter().cloned().chain([first.to_owned()]).collect());
                start.into_iter().chain(path[1..].iter().cloned()).collect()
            }
        };
        // Re-exports lead to where an item is defined; a circle of them ends.
        for _ in 0..16 {
            let depth = (0..=absolute.len()).rev().find(|depth| self.files.contains_key(&absolute[..*depth]))?;
            let item = absolute.get(depth)?;
            match self.files[&absolute[..depth]].exports.get(item) {
                Some(export) => absolute = export.iter().chain(&absolute[depth + 1..]).cloned().collect(),
                None => return Some(absolute[..depth].to_vec()),
            }
        }
        None
    }

    fn uses(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let uses = |(module, file): (&'_ Module, &File)| {
            let targets = file.paths.iter().filter_map(|path| self.target(module, path));
            targets.filter(|target| target != module).collect::<BTreeSet<Module>>()
        };
        self.files.iter().map(|(module, file)| (module, uses((module, file)))).collect()
    }

    /// The circles, each as the names of its files.
    fn circles(&self) -> Vec<BTreeSet<String>> {
        let uses = self.uses();
        let reachable = |from: &Module| {
            let mut reached = BTreeSet::new();
            let mut next: Vec<&Module> = uses[from].iter().collect();
            while let Some(module) = next.pop() {
                if reached.insert(module) {
                    next.extend(&uses[module]);
                }
            }
            reached
        };
        let reached: BTreeMap<&Module, BTreeSet<&Module>> =
            uses.keys().map(|module| (*module, reachable(module))).collect();
        let name = |module: &Module| if module.is_empty() { "lib".to_owned() } else { module.join("/") };
        let circle = |module: &&Module| {
            let others = reached[*module].iter().filter(|other| reached[**other].contains(*module));
            others.map(|it| name(it)).collect::<BTreeSet<String>>()
        };
        let circles: BTreeSet<BTreeSet<String>> = uses.keys().map(circle).filter(|it| it.len() > 1).collect();
        circles.into_iter().collect()
    }
}

/// A path that starts with `crate`, `self` or `super`, from the root.
fn absolute(module: &Module, path: &Module) -> Option<Module> {
    let mut base = module.clone();
    let mut rest = &path[..];
    while let Some((first, others)) = rest.split_first() {
        match first.as_str() {
            "crate" => base.clear(),
            "self" => {}
            "super" => drop(base.pop()?),
            _ => break,
        }
        rest = others;
    }
    Some(base.into_iter().chain(rest.iter().cloned()).collect())
}

impl File {
    fn read(tokens: TokenStream, module: &Module) -> Self {
        let mut file = Self::default();
        file.scan(&tokens.into_iter().collect::<Vec<_>>(), module);
        file
    }

    fn scan(&mut self, tokens: &[TokenTree], module: &Module) {
        let mut at = 0;
        let mut is_test = false;
        let mut is_public = false;
        while let Some(token) = tokens.get(at) {
            match token {
                TokenTree::Ident(word) if word == "pub" => is_public = true,
                TokenTree::Ident(word) if word == "use" => {
                    let end = tokens[at..].iter().position(is_semicolon).map_or(tokens.len(), |it| at + it);
                    if !is_test {
                        self.import(&tokens[at + 1..end], &mut Vec::new(), is_public, module);
                    }
                    (at, is_test, is_public) = (end, false, false);
                }
                TokenTree::Ident(word) if word == "mod" => {
                    // A module in this file is a part of it, unless it is one of tests.
                    if is_test && matches!(tokens.get(at + 2), Some(TokenTree::Group(_))) {
                        at += 2;
                    }
                    (is_test, is_public) = (false, false);
                }
                TokenTree::Ident(_) => {
                    let (path, end) = path_at(tokens, at);
                    if path.len() > 1 {
                        self.paths.push(path);
                    }
                    (at, is_public) = (end - 1, false);
                }
                TokenTree::Group(group) => {
                    let text = group.to_string().replace(' ', "");
                    if group.delimiter() == Delimiter::Bracket && text == "[cfg(test)]" {
                        is_test = true;
                    } else if !(is_public && group.delimiter() == Delimiter::Parenthesis) {
                        self.scan(&group.stream().into_iter().collect::<Vec<_>>(), module);
                    }
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
            at += 1;
        }
    }

    /// The tree of one import; `prefix` is the path before it.
    fn import(&mut self, tree: &[TokenTree], prefix: &mut Module, is_public: bool, module: &Module) {
        let before = prefix.len();
        for (number, part) in tree.iter().enumerate() {
            match part {
                TokenTree::Ident(word) if word == "as" => {
                    let alias = tree.get(number + 1).map(ToString::to_string).unwrap_or_default();
                    self.name(alias, prefix, is_public, module);
                    prefix.truncate(before);
                    return;
                }
                TokenTree::Ident(word) => prefix.push(word.to_string()),
                TokenTree::Group(group) => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    for tree in inner.split(|it| matches!(it, TokenTree::Punct(it) if it.as_char() == ',')) {
                        self.import(tree, prefix, is_public, module);
                    }
                    prefix.truncate(before);
                    return;
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
        if prefix.last().is_some_and(|last| last == "self") {
            prefix.pop();
        }
        if prefix.len() > before || prefix.len() > 1 {
            let name = prefix.last().cloned().unwrap_or_default();
            self.name(name, prefix, is_public, module);
        }
        prefix.truncate(before);
    }

    fn name(&mut self, name: String, path: &Module, is_public: bool, module: &Module) {
        // A path of another crate becomes one that names nothing outside of this file.
        let Some(target) = absolute(module, path) else { return };
        if is_public {
            self.exports.insert(name.clone(), target.clone());
        } else {
            self.paths.push(path.clone());
        }
        self.imports.insert(name, target);
    }
}

fn is_semicolon(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(it) if it.as_char() == ';')
}

/// The path that starts at a word, and where it ends.
fn path_at(tokens: &[TokenTree], start: usize) -> (Module, usize) {
    let is_colon = |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(it)) if it.as_char() == ':');
    let mut path = vec![tokens[start].to_string()];
    let mut at = start + 1;
    while is_colon(at)
        && is_colon(at + 1)
        && let Some(TokenTree::Ident(word)) = tokens.get(at + 2)
    {
        path.push(word.to_string());
        at += 3;
    }
    (path, at)
}

#[test]
fn files_of_the_federation_do_not_use_each_other_in_circles() {
    let federation = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("federation");
    let mut found: Vec<(String, BTreeSet<String>)> = Vec::new();
    for entry in federation.read_dir().expect("the crates").flatten().filter(|it| it.path().join("src").is_dir()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        found.extend(Crate::read(&entry.path()).circles().into_iter().map(|circle| (name.clone(), circle)));
    }
    assert!(found.is_empty(), "circles of files: {found:#?}");
}

#[test]
fn finds_a_circle_through_imports_and_re_exports() {
    let crate_of = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let path = folder.path().join("src").join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("created");
            std::fs::write(path, text).expect("written");
        }
        Crate::read(folder.path()).circles()
    };
    let circle = |names: &[&str]| vec![names.iter().map(|it| (*it).to_owned()).collect::<BTreeSet<String>>()];
    let lib = ("lib.rs", "pub mod a;\npub mod b;\npub use b::B;");
    assert_eq!(crate_of(&[lib, ("a.rs", "use crate::b::B;"), ("b.rs", "pub struct B;")]), Vec::new());
    let both = [lib, ("a.rs", "use crate::B;\npub struct A(B);"), ("b.rs", "pub struct B(super::a::A);")];
    assert_eq!(crate_of(&both), circle(&["a", "b"]));
    // A parent that declares its child and re-exports its items does not use it.
    let parent = "mod c;\npub use self::c::C;\npub struct A;\n#[cfg(test)]\nmod tests {\n    use super::c::C;\n}";
    let child = ("a/c.rs", "use super::A;\npub struct C(A);");
    assert_eq!(crate_of(&[lib, ("a.rs", parent), child, ("b.rs", "use crate::a::{A, C as D};")]), Vec::new());
    let using = "mod c;\npub struct A;\nfn f() -> usize {\n    c::f()\n}";
    assert_eq!(crate_of(&[lib, ("a.rs", using), child, ("b.rs", "")]), circle(&["a", "a/c"]));
    let long = [
        ("lib.rs", "mod a;\nmod b;\nmod c;"),
        ("a.rs", "use crate::b;\nfn f(x: b::X) {}"),
        ("b.rs", "fn f(x: crate::c::X) {}"),
        ("c.rs", "use super::{a::{X as Y}};"),
    ];
    assert_eq!(crate_of(&long), circle(&["a", "b", "c"]));
}
