//! Chat templates: messages rendered into the text of a prompt, as transformers' `apply_chat_template` does.

use minijinja::Environment;
use serde_json::{Map, Value};

use crate::error::ChatError;
use crate::jinja;
use crate::messages::normalise;
use crate::special::SpecialTokens;

/// Appended to the final message so that its end is found again in the rendered text (transformers' own mark).
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A conversation to render.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatPrompt<'a> {
    /// The messages in OpenAI's shape, at least one.
    pub messages: &'a [Value],
    /// Tool schemas, passed to the template as they are.
    pub tools: Option<&'a [Value]>,
    /// Documents, passed to the template as they are.
    pub documents: Option<&'a [Value]>,
    /// Whether the text ends with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Whether the text ends inside the final message.
    pub continue_final_message: bool,
    /// Further variables for the template.
    pub kwargs: Option<&'a Map<String, Value>>,
}

/// The compiled templates of a checkpoint.
pub struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    special: SpecialTokens,
}

impl ChatTemplate {
    /// Finds the templates of a checkpoint: `chat_template.jinja` wins over `tokenizer_config.json`, where they are a
    /// string or a list of `{name, template}`.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] if there is none, [`ChatError::Syntax`] if one does not compile.
    pub fn from_config(config: &Value, jinja: Option<String>, special: SpecialTokens) -> Result<Self, ChatError> {
        let sources = match (jinja, config.get("chat_template")) {
            (Some(source), _) => vec![("default".to_owned(), source)],
            (None, Some(Value::String(source))) => vec![("default".to_owned(), source.clone())],
            (None, Some(Value::Array(list))) => list.iter().filter_map(named_source).collect(),
            (None, _) => Vec::new(),
        };
        if sources.is_empty() {
            return Err(ChatError::NoTemplate);
        }
        Self::new(sources, special)
    }

    /// Compiles templates given as `(name, source)`; `default` and `tool_use` are the names that are chosen.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] names the template.
    pub fn new(sources: Vec<(String, String)>, special: SpecialTokens) -> Result<Self, ChatError> {
        let mut environment = jinja::environment();
        let mut names = Vec::with_capacity(sources.len());
        for (name, source) in sources {
            environment
                .add_template_owned(name.clone(), jinja::without_generation_blocks(&source))
                .map_err(|error| ChatError::Syntax { name: name.clone(), message: error.to_string() })?;
            names.push(name);
        }
        Ok(Self { environment, names, special })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`ChatError::Message`] names a malformed message, [`ChatError::Raised`] carries the template's own refusal.
    pub fn render(&self, prompt: &ChatPrompt<'_>) -> Result<String, ChatError> {
        let mut messages = normalise(prompt.messages)?;
        let final_text = if prompt.continue_final_message { Some(mark_final_message(&mut messages)?) } else { None };
        let name = self.choose(prompt.tools.is_some())?;
        let template = self.environment.get_template(name).map_err(|error| jinja::render_error(&error))?;
        let rendered =
            template.render(self.variables(prompt, messages)).map_err(|error| jinja::render_error(&error))?;
        match final_text {
            Some(text) => cut_at_mark(rendered, &text),
            None => Ok(rendered),
        }
    }

    fn choose(&self, with_tools: bool) -> Result<&str, ChatError> {
        let wanted = if with_tools { ["tool_use", "default"] } else { ["default", "default"] };
        let found = wanted.into_iter().find_map(|name| self.names.iter().find(|known| *known == name));
        found.map(String::as_str).ok_or_else(|| ChatError::NoDefault(self.names.clone()))
    }

    /// The template's variables; the request's own cannot hide the fixed ones.
    fn variables(&self, prompt: &ChatPrompt<'_>, messages: Vec<Value>) -> minijinja::Value {
        let mut variables: Map<String, Value> =
            self.special.iter().map(|(name, text)| (name.to_owned(), Value::from(text))).collect();
        variables.extend(prompt.kwargs.into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())));
        variables.insert("messages".into(), Value::Array(messages));
        for (name, list) in [("tools", prompt.tools), ("documents", prompt.documents)] {
            variables.insert(name.into(), list.map_or(Value::Null, |list| Value::Array(list.to_vec())));
        }
        variables.insert("add_generation_prompt".into(), Value::Bool(prompt.add_generation_prompt));
        minijinja::Value::from(minijinja::value::Serde(&variables))
    }
}

fn named_source(entry: &Value) -> Option<(String, String)> {
    Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()))
}

/// Marks the end of the final message and returns its text.
fn mark_final_message(messages: &mut [Value]) -> Result<String, ChatError> {
    let content = messages.last_mut().and_then(|message| message.get_mut("content"));
    let Some(Value::String(text)) = content else {
        return Err(ChatError::Continue("the final message has no content to continue"));
    };
    let unmarked = text.clone();
    text.push_str(CONTINUE_MARK);
    Ok(unmarked)
}

/// Cuts the rendered text where the final message ends; a template that trims messages trims its end as well.
fn cut_at_mark(mut rendered: String, final_text: &str) -> Result<String, ChatError> {
    let missing = ChatError::Continue("the chat template drops or changes the final message");
    let Some(at) = rendered.rfind(CONTINUE_MARK.trim_end()) else { return Err(missing) };
    if !rendered.contains(final_text.trim()) {
        return Err(missing);
    }
    let kept_spacing = rendered[at..].starts_with(CONTINUE_MARK);
    rendered.truncate(at);
    if !kept_spacing {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}
