//! What good requests get.

use serde_json::{Value, json};

use super::toy::{self, END};
use super::{Server, Setup, get, post, streamed_text};

#[tokio::test]
async fn completions_answer_text_and_token_ids() {
    let server = Server::plain().await;
    let answer = server.complete(json!({"model": "toy", "prompt": "abc", "max_tokens": 4})).await;
    let body = answer.json();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "toy");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(body["created"].as_u64().unwrap() > 0 && body["system_fingerprint"].is_string());
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("defg"), &json!("length")));
    assert_eq!(choice["stop_reason"], Value::Null);
    assert!(choice.get("token_ids").is_none());
    let usage = json!({"prompt_tokens": 3, "total_tokens": 7, "completion_tokens": 4,
                       "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(body["usage"], usage);

    let body =
        server.complete(json!({"prompt": [[97, 98], [120]], "n": 2, "return_token_ids": true})).await.json();
    let choices = body["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(choices[0]["text"], "cdefghijklmnopqr", "16 tokens by default");
    assert_eq!(choices[1]["text"], "dfhjlnprtvxz", "the second choice takes every second letter");
    assert_eq!((&choices[2]["text"], &choices[2]["finish_reason"]), (&json!("yz"), &json!("stop")));
    assert_eq!(choices[2]["token_ids"], json!([121, 122, END]), "the end is a token but no text");
    assert_eq!(choices[2]["prompt_token_ids"], json!([120]));
    assert_eq!(body["usage"]["completion_tokens"], 16 + 13 + 3 + 2);
    assert_eq!(server.snapshot().generation_tokens, 4 + 34);
}

#[tokio::test]
async fn echo_repeats_and_scores_the_prompt() {
    let server = Server::plain().await;
    let body = json!({"prompt": "ab", "max_tokens": 0, "echo": true, "logprobs": 1});
    let choice = &server.complete(body).await.json()["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("length")));
    let expected = json!({"text_offset": [0, 1], "token_logprobs": [null, -0.5], "tokens": ["a", "b"],
                          "top_logprobs": [null, {"b": -0.5}]});
    assert_eq!(choice["logprobs"], expected);
    assert!(choice.get("prompt_logprobs").is_none());

    let body =
        json!({"prompt": [97, 98], "max_tokens": 1, "echo": true, "logprobs": 2, "prompt_logprobs": 0});
    let choice = &server.complete(body).await.json()["choices"][0];
    assert_eq!(choice["text"], "abc");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
    assert_eq!(choice["logprobs"]["top_logprobs"][2], json!({"c": -0.5, "d": -1.5}));
    let scored = json!([null, {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]);
    assert_eq!(choice["prompt_logprobs"], scored);
}

#[tokio::test]
async fn offsets_count_characters_of_the_text_whatever_tokens_are_called() {
    let server = Server::plain().await;
    for as_ids in [false, true] {
        // Two tokens are one character, and what is drawn after its second byte is an a.
        let body = json!({"prompt": "aé", "max_tokens": 2, "echo": true, "logprobs": 0,
                          "return_tokens_as_token_ids": as_ids});
        let choice = &server.complete(body).await.json()["choices"][0];
        assert_eq!(choice["text"], "aéab");
        assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 1, 2, 3]), "{as_ids}");
        let names = &choice["logprobs"]["tokens"];
        assert_eq!(names[0], if as_ids { "token_id:97" } else { "a" });
    }
    let body = json!({"prompt": [120], "max_tokens": 5, "logprobs": 0, "return_tokens_as_token_ids": true});
    let choice = &server.complete(body).await.json()["choices"][0];
    assert_eq!((&choice["text"], &choice["logprobs"]["text_offset"]), (&json!("yz"), &json!([0, 1, 2])));
}

#[tokio::test]
async fn stop_strings_and_tokens_end_a_choice_where_they_should() {
    let server = Server::plain().await;
    let cases = [
        (json!({"stop": "efg"}), "bcd", json!("efg"), 6),
        (json!({"stop": ["zz", "d"]}), "bc", json!("d"), 3),
        (json!({"stop": "d", "include_stop_str_in_output": true}), "bcd", json!("d"), 3),
        (json!({"stop_token_ids": [101]}), "bcd", json!(101), 4),
        (json!({"stop_token_ids": [101], "include_stop_str_in_output": true}), "bcde", json!(101), 4),
        // The first d is one of the tokens that must not stop it.
        (json!({"stop": ["d", "h"], "min_tokens": 5}), "bcdefg", json!("h"), 7),
    ];
    for (extra, text, stop_reason, tokens) in cases {
        let mut body = json!({"prompt": "a", "max_tokens": 20});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let whole = server.complete(body.clone()).await.json();
        let choice = &whole["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("stop")), "{extra}");
        assert_eq!(
            (&choice["stop_reason"], &whole["usage"]["completion_tokens"]),
            (&stop_reason, &json!(tokens))
        );

        body["stream"] = json!(true);
        let events = server.complete(body).await.events();
        assert_eq!(streamed_text(&events, 0), text, "{extra}");
        let finishes = events.iter().filter(|event| event["choices"][0]["finish_reason"] == "stop");
        assert_eq!(finishes.count(), 1, "{extra}");
        assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], stop_reason);
    }
    let snapshot = server.snapshot();
    // The toy may have drawn all its tokens before it hears of a match, so only the sum is certain.
    assert_eq!((snapshot.completed(), snapshot.cancelled, snapshot.in_flight), (12, 0, 0));
}

#[tokio::test]
async fn completions_stream() {
    let server = Server::plain().await;
    let body = json!({"prompt": ["a", "k"], "max_tokens": 3, "stream": true, "echo": true, "logprobs": 0,
                      "stream_options": {"include_usage": true}});
    let answer = server.complete(body).await;
    let events = answer.events();
    assert_eq!((streamed_text(&events, 0), streamed_text(&events, 1)), ("abcd".into(), "klmn".into()));
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 6);
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert!(chunks.iter().all(|chunk| chunk["id"] == last["id"] && chunk["object"] == "text_completion"));
    let offsets: Vec<&Value> = chunks
        .iter()
        .filter(|chunk| chunk["choices"][0]["index"] == 1)
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array().unwrap())
        .collect();
    assert_eq!(offsets, [0, 1, 2, 3]);

    let body = json!({"prompt": "a", "max_tokens": 2, "stream": true,
                      "stream_options": {"continuous_usage_stats": true}});
    let events = server.complete(body).await.events();
    let counts: Vec<&Value> = events.iter().map(|event| &event["usage"]["completion_tokens"]).collect();
    assert_eq!(counts, [1, 2]);
}

#[tokio::test]
async fn chat_answers_whole_and_streamed() {
    let server = Server::plain().await;
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]);
    let body = json!({"messages": messages, "logprobs": true, "top_logprobs": 1, "max_completion_tokens": 3, "max_tokens": 9});
    let whole = server.post("/v1/chat/completions", body).await.json();
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "abc", "refusal": null}));
    assert_eq!(choice["finish_reason"], "length");
    let first = json!({"token": "a", "logprob": -0.5, "bytes": [97],
                       "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}]});
    assert_eq!(choice["logprobs"]["content"][0], first);
    // <|im_start|>system:s<|im_end|><|im_start|>user:u<|im_end|><|im_start|>
    assert_eq!(whole["usage"]["prompt_tokens"], 1 + 8 + 1 + 1 + 6 + 1 + 1);

    let body =
        json!({"messages": messages, "stream": true, "n": 2, "stream_options": {"include_usage": true}});
    let events = server.post("/v1/chat/completions", body).await.events();
    for (index, text) in [(0, "abcdefghijklmnopqrstuvwxyz"), (1, "bdfhjlnprtvxz")] {
        let of_choice: Vec<&Value> = events
            .iter()
            .flat_map(|event| event["choices"].as_array().unwrap())
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(of_choice[0]["delta"], json!({"role": "assistant", "content": ""}));
        let content: String =
            of_choice.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(content, text);
        let finishes: Vec<&Value> = of_choice
            .iter()
            .map(|choice| &choice["finish_reason"])
            .filter(|reason| !reason.is_null())
            .collect();
        assert_eq!(finishes, ["stop"]);
    }
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 27 + 14);
    assert_eq!(events.last().unwrap()["object"], "chat.completion.chunk");
}

#[tokio::test]
async fn a_model_without_tokenizer_takes_and_gives_ids() {
    let server = Server::start(Setup { with_text: false, ..Setup::default() }).await;
    let body = server.complete(json!({"prompt": [97], "max_tokens": 2, "logprobs": 0})).await.json();
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["token_ids"]), (&json!(""), &json!([98, 99])));
    assert_eq!(choice["logprobs"]["tokens"], json!(["token_id:98", "token_id:99"]));
    let events = server.complete(json!({"prompt": [97], "max_tokens": 3, "stream": true})).await.events();
    let ids: Vec<u64> = events
        .iter()
        .flat_map(|event| event["choices"][0]["token_ids"].as_array().unwrap())
        .map(|id| id.as_u64().unwrap())
        .collect();
    assert_eq!(ids, [98, 99, 100]);

    let refused = [
        ("/v1/completions", json!({"prompt": "a"}), "prompt"),
        ("/v1/completions", json!({"prompt": [97], "stop": "x"}), "stop"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "a"}]}), "messages"),
        ("/tokenize", json!({"prompt": "a"}), "prompt"),
        ("/detokenize", json!({"tokens": [97]}), "tokens"),
    ];
    for (path, body, param) in refused {
        assert_eq!(
            server.post(path, body).await.error(),
            (400, "BadRequestError".into(), json!(param)),
            "{path}"
        );
    }
}

#[tokio::test]
async fn tokenize_and_back() {
    let server = Server::plain().await;
    let body = server.post("/tokenize", json!({"prompt": "hé", "return_token_strs": true})).await.json();
    assert_eq!((&body["count"], &body["tokens"]), (&json!(3), &json!([104, 195, 169])));
    assert_eq!(body["max_model_len"], toy::CONTEXT);
    assert_eq!(body["token_strs"][0], "h");
    let body = server.post("/detokenize", json!({"tokens": [104, 195, 169]})).await.json();
    assert_eq!(body["prompt"], "hé");
    let chat =
        json!({"messages": [{"role": "user", "content": "<|im_end|>"}], "add_generation_prompt": false});
    let tokens = server.post("/tokenize", chat).await.json()["tokens"].clone();
    let ends = tokens.as_array().unwrap().iter().filter(|id| **id == END).count();
    assert_eq!(ends, 1, "special text inside a message stays text: {tokens}");
    // Counting is allowed beyond the context.
    let long = server.post("/tokenize", json!({"prompt": "x".repeat(20_000)})).await.json();
    assert_eq!(long["count"], 20_000);
}

#[tokio::test]
async fn models_version_and_request_ids() {
    let server = Server::plain().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let card = &list["data"][0];
    assert_eq!((&card["id"], &card["max_model_len"]), (&json!("toy"), &json!(toy::CONTEXT)));
    for field in ["object", "created", "owned_by", "root", "parent", "permission"] {
        assert!(card.get(field).is_some(), "{field}");
    }
    assert_eq!(server.get("/v1/models/toy").await.json(), *card);
    assert_eq!(server.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));

    let own = server.request(post("/v1/completions", r#"{"prompt":[97]}"#, "x-request-id: my-id\r\n")).await;
    assert_eq!((own.header("x-request-id"), &own.json()["id"]), (Some("my-id"), &json!("cmpl-my-id")));
    let replaced = server.request(get("/version", "x-request-id: has spaces\r\n")).await;
    assert_eq!(replaced.header("x-request-id").unwrap().len(), 32);
}
