//! Tokens into events, by libyaml's grammar.

use std::borrow::Cow;

use super::scan::{Kind, Scanner, Span};
use super::tree::SyntaxError;

/// What a node says of itself before its content.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Properties<'t> {
    pub anchor: Option<&'t str>,
    /// The whole tag; `!!str` is `tag:yaml.org,2002:str`.
    pub tag: Option<Cow<'t, str>>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event<'t> {
    DocumentStart,
    DocumentEnd,
    StreamEnd,
    Alias(&'t str),
    /// `span` is `None` where the value is left out.
    Scalar {
        properties: Properties<'t>,
        span: Option<Span>,
        plain: bool,
    },
    SequenceStart(Properties<'t>),
    SequenceEnd,
    MappingStart(Properties<'t>),
    MappingEnd,
}

/// What is read next.
#[derive(Debug, Clone, Copy)]
enum State {
    /// `first`: a document may start without `---`.
    Start {
        first: bool,
    },
    Content,
    End,
    BlockNode,
    BlockSequence,
    IndentlessSequence,
    BlockKey,
    BlockValue,
    FlowSequence {
        first: bool,
    },
    /// A key and its value that are an entry of a flow sequence.
    PairKey,
    PairValue,
    PairEnd,
    FlowKey {
        first: bool,
    },
    FlowValue,
    /// A key of a flow mapping without a `:`.
    FlowNoValue,
    Done,
}

#[derive(Debug)]
pub(super) struct Events<'t> {
    pub scanner: Scanner<'t>,
    state: State,
    after: Vec<State>,
    /// Handles and prefixes of `%TAG`.
    handles: Vec<(&'t str, Cow<'t, str>)>,
}

type Read<'t> = Result<(u32, Event<'t>), SyntaxError>;

fn fail<T>(line: u32, message: &str) -> Result<T, SyntaxError> {
    Err(SyntaxError { line, message: format!("not valid YAML: {message}") })
}

impl<'t> Events<'t> {
    pub fn new(text: &'t str, first_line: u32) -> Self {
        let state = State::Start { first: true };
        Self { scanner: Scanner::new(text, first_line), state, after: Vec::new(), handles: Vec::new() }
    }

    /// The next event with its line. After [`Event::StreamEnd`] it is that again.
    pub fn next(&mut self) -> Read<'t> {
        match self.state {
            State::Start { first } => self.start(first),
            State::Content => self.content(),
            State::End => self.end(),
            State::BlockNode => self.node(true, false),
            State::BlockSequence => self.block_entry(),
            State::IndentlessSequence => self.indentless_entry(),
            State::BlockKey => self.block_key(),
            State::BlockValue => self.block_value(),
            State::FlowSequence { first } => self.flow_entry(first),
            State::PairKey => {
                let (line, kind) = self.peek()?;
                match kind {
                    // What follows is taken as well, as go-yaml takes it.
                    Kind::Value | Kind::FlowEntry | Kind::FlowSequenceEnd => {
                        self.scanner.take()?;
                        self.empty(line, State::PairValue)
                    }
                    _ => self.flow_node(State::PairValue),
                }
            }
            State::PairValue => self.flow_value(State::PairEnd),
            State::PairEnd => {
                let (line, _) = self.peek()?;
                self.state = State::FlowSequence { first: false };
                Ok((line, Event::MappingEnd))
            }
            State::FlowKey { first } => self.flow_key(first),
            State::FlowValue => self.flow_value(State::FlowKey { first: false }),
            State::FlowNoValue => {
                let (line, _) = self.peek()?;
                self.empty(line, State::FlowKey { first: false })
            }
            State::Done => Ok((self.scanner.line(), Event::StreamEnd)),
        }
    }

    fn peek(&mut self) -> Result<(u32, &Kind<'t>), SyntaxError> {
        let token = self.scanner.peek()?;
        Ok((token.line, &token.kind))
    }

    /// Goes on with what waited for the node that ends.
    fn pop(&mut self) {
        self.state = self.after.pop().unwrap_or(State::Done);
    }

    fn empty(&mut self, line: u32, next: State) -> Read<'t> {
        self.state = next;
        Ok((line, Event::Scalar { properties: Properties::default(), span: None, plain: true }))
    }

    fn block_node(&mut self, next: State, indentless: bool) -> Read<'t> {
        self.after.push(next);
        self.node(true, indentless)
    }

    fn flow_node(&mut self, next: State) -> Read<'t> {
        self.after.push(next);
        self.node(false, false)
    }

    fn start(&mut self, first: bool) -> Read<'t> {
        if !first {
            while let (_, Kind::DocumentEnd) = self.peek()? {
                self.scanner.take()?;
            }
        }
        let (line, kind) = self.peek()?;
        match kind {
            Kind::StreamEnd => {
                self.state = State::Done;
                return Ok((line, Event::StreamEnd));
            }
            Kind::Version | Kind::TagDirective { .. } | Kind::DocumentStart => {}
            _ if first => {
                self.after.push(State::End);
                self.state = State::BlockNode;
                return Ok((line, Event::DocumentStart));
            }
            _ => return fail(line, "text after the end of the document"),
        }
        loop {
            let token = self.scanner.take()?;
            match token.kind {
                Kind::Version => {}
                Kind::TagDirective { handle, prefix } => self.handles.push((handle, prefix)),
                Kind::DocumentStart => break,
                _ => return fail(token.line, "a document starts with \"---\" after directives"),
            }
        }
        self.after.push(State::End);
        self.state = State::Content;
        Ok((line, Event::DocumentStart))
    }

    fn content(&mut self) -> Read<'t> {
        let (line, kind) = self.peek()?;
        match kind {
            Kind::Version | Kind::TagDirective { .. } | Kind::DocumentStart | Kind::DocumentEnd | Kind::StreamEnd => {
                let next = self.after.pop().unwrap_or(State::Done);
                self.empty(line, next)
            }
            _ => self.node(true, false),
        }
    }

    fn end(&mut self) -> Read<'t> {
        let (line, kind) = self.peek()?;
        if *kind == Kind::DocumentEnd {
            self.scanner.take()?;
        }
        self.handles.clear();
        self.state = State::Start { first: false };
        Ok((line, Event::DocumentEnd))
    }

    fn properties(&mut self) -> Result<Properties<'t>, SyntaxError> {
        let mut properties = Properties::default();
        loop {
            let (_, kind) = self.peek()?;
            match kind {
                Kind::Anchor(name) if properties.anchor.is_none() => {
                    properties.anchor = Some(name);
                    self.scanner.take()?;
                }
                Kind::Tag { .. } if properties.tag.is_none() => {
                    let token = self.scanner.take()?;
                    let Kind::Tag { handle, suffix } = token.kind else { unreachable!("it was looked at") };
                    properties.tag = Some(self.whole_tag(token.line, handle, suffix)?);
                }
                _ => return Ok(properties),
            }
        }
    }

    fn whole_tag(&self, line: u32, handle: &str, suffix: Cow<'t, str>) -> Result<Cow<'t, str>, SyntaxError> {
        let declared = self.handles.iter().find(|(known, _)| *known == handle).map(|(_, prefix)| &**prefix);
        match (declared, handle) {
            (Some(prefix), _) => Ok(format!("{prefix}{suffix}").into()),
            (None, "") => Ok(suffix),
            (None, "!") => Ok(format!("!{suffix}").into()),
            (None, "!!") => Ok(format!("tag:yaml.org,2002:{suffix}").into()),
            (None, _) => fail(line, &format!("the tag handle {handle} is not declared")),
        }
    }

    fn node(&mut self, block: bool, indentless: bool) -> Read<'t> {
        let (line, kind) = self.peek()?;
        if let Kind::Alias(name) = *kind {
            self.scanner.take()?;
            self.pop();
            return Ok((line, Event::Alias(name)));
        }
        let properties = self.properties()?;
        let (content_line, kind) = self.peek()?;
        let event = match kind {
            Kind::BlockEntry if indentless => {
                self.state = State::IndentlessSequence;
                return Ok((line, Event::SequenceStart(properties)));
            }
            Kind::Scalar { span, plain } => {
                let (span, plain) = (Some(*span), *plain);
                self.pop();
                Event::Scalar { properties, span, plain }
            }
            Kind::FlowSequenceStart => {
                self.state = State::FlowSequence { first: true };
                Event::SequenceStart(properties)
            }
            Kind::FlowMappingStart => {
                self.state = State::FlowKey { first: true };
                Event::MappingStart(properties)
            }
            Kind::BlockSequenceStart if block => {
                self.state = State::BlockSequence;
                Event::SequenceStart(properties)
            }
            Kind::BlockMappingStart if block => {
                self.state = State::BlockKey;
                Event::MappingStart(properties)
            }
            _ if properties != Properties::default() => {
                self.pop();
                return Ok((line, Event::Scalar { properties, span: None, plain: true }));
            }
            _ => return fail(content_line, "a value is missing, or unexpected"),
        };
        self.scanner.take()?;
        Ok((line, event))
    }

    fn block_entry(&mut self) -> Read<'t> {
        let token = self.scanner.take()?;
        match token.kind {
            Kind::BlockEntry => match self.peek()?.1 {
                Kind::BlockEntry | Kind::BlockEnd => self.empty(token.line, State::BlockSequence),
                _ => self.block_node(State::BlockSequence, false),
            },
            Kind::BlockEnd => {
                self.pop();
                Ok((token.line, Event::SequenceEnd))
            }
            _ => fail(token.line, "a \"-\" is expected, as before the other items of the list"),
        }
    }

    fn indentless_entry(&mut self) -> Read<'t> {
        let (line, kind) = self.peek()?;
        if *kind != Kind::BlockEntry {
            self.pop();
            return Ok((line, Event::SequenceEnd));
        }
        self.scanner.take()?;
        match self.peek()?.1 {
            Kind::BlockEntry | Kind::Key | Kind::Value | Kind::BlockEnd => self.empty(line, State::IndentlessSequence),
            _ => self.block_node(State::IndentlessSequence, false),
        }
    }

    fn block_key(&mut self) -> Read<'t> {
        let token = self.scanner.take()?;
        match token.kind {
            Kind::Key => match self.peek()?.1 {
                Kind::Key | Kind::Value | Kind::BlockEnd => self.empty(token.line, State::BlockValue),
                _ => self.block_node(State::BlockValue, true),
            },
            Kind::BlockEnd => {
                self.pop();
                Ok((token.line, Event::MappingEnd))
            }
            _ => fail(token.line, "a key is expected, as on the lines before"),
        }
    }

    fn block_value(&mut self) -> Read<'t> {
        let (line, kind) = self.peek()?;
        if *kind != Kind::Value {
            return self.empty(line, State::BlockKey);
        }
        self.scanner.take()?;
        match self.peek()?.1 {
            Kind::Key | Kind::Value | Kind::BlockEnd => self.empty(line, State::BlockKey),
            _ => self.block_node(State::BlockKey, true),
        }
    }

    /// Past the comma before an entry of a flow collection; false where the collection ends.
    fn next_in_flow(&mut self, first: bool, end: &Kind<'t>, wanted: &str) -> Result<bool, SyntaxError> {
        let (line, kind) = self.peek()?;
        if kind == end {
            return Ok(false);
        }
        if !first {
            if *kind != Kind::FlowEntry {
                return fail(line, wanted);
            }
            self.scanner.take()?;
        }
        Ok(self.peek()?.1 != end)
    }

    fn flow_entry(&mut self, first: bool) -> Read<'t> {
        if !self.next_in_flow(first, &Kind::FlowSequenceEnd, "a \",\" or a \"]\" is expected")? {
            let token = self.scanner.take()?;
            self.pop();
            return Ok((token.line, Event::SequenceEnd));
        }
        let (line, kind) = self.peek()?;
        if *kind == Kind::Key {
            self.scanner.take()?;
            self.state = State::PairKey;
            return Ok((line, Event::MappingStart(Properties::default())));
        }
        self.flow_node(State::FlowSequence { first: false })
    }

    fn flow_key(&mut self, first: bool) -> Read<'t> {
        if !self.next_in_flow(first, &Kind::FlowMappingEnd, "a \",\" or a \"}\" is expected")? {
            let token = self.scanner.take()?;
            self.pop();
            return Ok((token.line, Event::MappingEnd));
        }
        if *self.peek()?.1 != Kind::Key {
            return self.flow_node(State::FlowNoValue);
        }
        self.scanner.take()?;
        let (line, kind) = self.peek()?;
        match kind {
            Kind::Value | Kind::FlowEntry | Kind::FlowMappingEnd => self.empty(line, State::FlowValue),
            _ => self.flow_node(State::FlowValue),
        }
    }

    /// The value of a pair in a flow collection, before whose end or comma it may be left out.
    fn flow_value(&mut self, next: State) -> Read<'t> {
        let (line, kind) = self.peek()?;
        if *kind != Kind::Value {
            return self.empty(line, next);
        }
        self.scanner.take()?;
        let (line, kind) = self.peek()?;
        match kind {
            Kind::FlowEntry | Kind::FlowSequenceEnd if matches!(next, State::PairEnd) => self.empty(line, next),
            Kind::FlowEntry | Kind::FlowMappingEnd if !matches!(next, State::PairEnd) => self.empty(line, next),
            _ => self.flow_node(next),
        }
    }
}
