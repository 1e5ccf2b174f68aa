//! Chat templates against transformers' `apply_chat_template` (tests/golden/make_chat.py).

use moetrail_text::{ChatError, ChatPrompt, ChatTemplate, SpecialTokens};
use serde_json::{Map, Value, json};

fn special() -> SpecialTokens {
    SpecialTokens::from_config(&json!({"bos_token": "<s>", "eos_token": "</s>"}), None)
}

fn render(template: &ChatTemplate, messages: &Value, options: &Map<String, Value>) -> Result<String, ChatError> {
    let mut kwargs = options.clone();
    let tools = kwargs.remove("tools");
    let mut flag = |name: &str| kwargs.remove(name).is_some_and(|value| value == true);
    let (add_generation_prompt, continue_final_message) =
        (flag("add_generation_prompt"), flag("continue_final_message"));
    template.render(&ChatPrompt {
        messages: messages.as_array().expect("a list"),
        tools: tools.as_ref().map(|tools| tools.as_array().expect("a list").as_slice()),
        documents: None,
        add_generation_prompt,
        continue_final_message,
        kwargs: Some(&kwargs),
    })
}

#[test]
fn every_golden_conversation_renders_as_transformers_renders_it() {
    let golden: Value = serde_json::from_str(include_str!("golden/chat.json")).expect("valid JSON");
    let cases = golden["cases"].as_array().expect("a list");
    assert!(cases.len() > 10);
    for case in cases {
        let style = case["style"].as_str().expect("a name");
        let source = golden["templates"][style].as_str().expect("a template").to_owned();
        let template = ChatTemplate::new(vec![("default".into(), source)], special()).expect("compiles");
        let found = render(&template, &case["messages"], case["options"].as_object().expect("an object"));
        match (found, case.get("text"), case.get("error")) {
            (Ok(found), Some(text), _) => {
                assert_eq!(found, text.as_str().expect("text"), "{style} {}", case["options"])
            }
            (Err(_), None, Some(_)) => {}
            (found, _, _) => panic!("{style} {}: {found:?}, expected {case}", case["options"]),
        }
    }
}

#[test]
fn a_refusal_of_the_template_is_told_in_its_own_words() {
    let source = "{{ raise_exception('roles must alternate') }}".to_owned();
    let template = ChatTemplate::new(vec![("default".into(), source)], special()).expect("compiles");
    let error = render(&template, &json!([{"role": "user", "content": "a"}]), &Map::new()).expect_err("it refuses");
    assert_eq!(error, ChatError::Raised("roles must alternate".into()));
    assert_eq!(error.param(), "messages");
}

#[test]
fn tools_choose_the_template_made_for_them() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]});
    let template = ChatTemplate::from_config(&config, None, special()).expect("compiles");
    let messages = json!([{"role": "user", "content": "a"}]);
    let with_tools = json!({"tools": [{"type": "function"}]});
    assert_eq!(render(&template, &messages, &Map::new()).as_deref(), Ok("plain"));
    assert_eq!(render(&template, &messages, with_tools.as_object().expect("an object")).as_deref(), Ok("tools"));
    let from_file = ChatTemplate::from_config(&config, Some("file".into()), special()).expect("compiles");
    assert_eq!(render(&from_file, &messages, &Map::new()).as_deref(), Ok("file"));
}

#[test]
fn a_template_that_is_missing_or_broken_is_named() {
    let refused = |config: Value| ChatTemplate::from_config(&config, None, special()).err();
    assert_eq!(refused(json!({})), Some(ChatError::NoTemplate));
    let broken = refused(json!({"chat_template": "{% for %}"}));
    assert!(matches!(broken, Some(ChatError::Syntax { ref name, .. }) if name == "default"), "{broken:?}");
    let config = json!({"chat_template": [{"name": "rag", "template": "x"}]});
    let template = ChatTemplate::from_config(&config, None, special()).expect("compiles");
    let error = render(&template, &json!([{"role": "user", "content": "a"}]), &Map::new()).err();
    assert_eq!(error, Some(ChatError::NoDefault(vec!["rag".into()])));
}

#[test]
fn a_final_message_without_text_cannot_be_continued() {
    let template = ChatTemplate::new(vec![("default".into(), "x".into())], special()).expect("compiles");
    let options = json!({"continue_final_message": true});
    let options = options.as_object().expect("an object");
    let error = render(&template, &json!([{"role": "assistant"}]), options).expect_err("nothing to continue");
    assert_eq!(error.param(), "continue_final_message");
    let error =
        render(&template, &json!([{"role": "user", "content": "a"}]), options).expect_err("the template drops it");
    assert!(error.to_string().contains("drops"), "{error}");
}
