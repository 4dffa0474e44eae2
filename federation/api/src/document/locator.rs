//! The lines of fields that are named by their paths.

use std::collections::HashMap;

use super::tree::Node;

/// Finds the places of field paths such as `spec.ingress[0].ports` in an object. Each list and mapping is looked through once,
/// so that the time for any number of paths grows with the size of the object.
#[derive(Debug)]
pub struct Locator<'d> {
    object: Node<'d>,
    lists: HashMap<u32, Vec<u32>>,
    mappings: HashMap<u32, HashMap<&'d str, u32>>,
}

impl<'d> Locator<'d> {
    pub fn new(object: Node<'d>) -> Self {
        Self { object, lists: HashMap::new(), mappings: HashMap::new() }
    }

    /// The line of a path, or of the deepest part of it that exists.
    pub fn line_of(&mut self, path: &str) -> u32 {
        let mut line = self.object.line();
        self.follow(path, |found| line = found.line());
        line
    }

    /// The place of the last part of a path: the key of a field, or an item.
    pub fn place_of(&mut self, path: &str) -> Option<u32> {
        let mut place = None;
        let whole = self.follow(path, |found| place = Some(found.at));
        place.filter(|_| whole)
    }

    /// Visits each part of a path as far as they exist; false where one does not.
    fn follow(&mut self, path: &str, mut visit: impl FnMut(Node<'d>)) -> bool {
        let mut node = self.object;
        for part in path.split(['.', '[']).filter(|part| !part.is_empty()) {
            let found = if node.is_mapping() {
                let keys = self
                    .mappings
                    .entry(node.at)
                    .or_insert_with(|| node.pairs().map(|(key, _)| (key.key(), key.at)).collect());
                keys.get(part).map(|key| (node.to(*key), node.to(*key + 1)))
            } else {
                let items = self.lists.entry(node.at).or_insert_with(|| node.items().map(|item| item.at).collect());
                let index = part.strip_suffix(']').and_then(|index| index.parse::<usize>().ok());
                index.and_then(|index| items.get(index)).map(|item| (node.to(*item), node.to(*item)))
            };
            let Some((found, value)) = found else { return false };
            visit(found);
            node = value;
        }
        true
    }
}
