// Reads documents as an API server does, for tests that compare.
//
// Each line of standard input is a document as a JSON string; each line of standard output is what became of it: the
// document as JSON ("json"), and where its kind is one of Kubernetes' own, the object with its defaults ("object"), or
// the error of either. Unknown fields and duplicate keys are errors, as they are with fieldValidation=Strict.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/runtime"
	serializer "k8s.io/apimachinery/pkg/runtime/serializer/json"
	core "k8s.io/kubernetes/pkg/apis/core/v1"
	discovery "k8s.io/kubernetes/pkg/apis/discovery/v1"
	networking "k8s.io/kubernetes/pkg/apis/networking/v1"
	"sigs.k8s.io/yaml"
)

// A document may be as long as a line.
const maxLineBytes = 64 << 20

type answer struct {
	JSON        json.RawMessage `json:"json,omitempty"`
	JSONError   string          `json:"jsonError,omitempty"`
	Object      json.RawMessage `json:"object,omitempty"`
	ObjectError string          `json:"objectError,omitempty"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{core.AddToScheme, discovery.AddToScheme, networking.AddToScheme} {
		if err := add(scheme); err != nil {
			return err
		}
	}
	options := serializer.SerializerOptions{Yaml: true, Strict: true}
	decoder := serializer.NewSerializerWithOptions(serializer.DefaultMetaFactory, scheme, scheme, options)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, maxLineBytes)
	out := bufio.NewWriter(os.Stdout)
	encoder := json.NewEncoder(out)
	for lines.Scan() {
		var document string
		if err := json.Unmarshal(lines.Bytes(), &document); err != nil {
			return fmt.Errorf("a line of input is not a JSON string: %w", err)
		}
		if err := encoder.Encode(read(decoder, scheme, []byte(document))); err != nil {
			return err
		}
		// The other side may wait for the answer before it writes the next document.
		if err := out.Flush(); err != nil {
			return err
		}
	}
	return lines.Err()
}

func read(decoder runtime.Decoder, scheme *runtime.Scheme, document []byte) (read answer) {
	if converted, err := yaml.YAMLToJSON(document); err != nil {
		read.JSONError = err.Error()
	} else {
		read.JSON = converted
	}
	object, kind, err := decoder.Decode(document, nil, nil)
	if err == nil {
		scheme.Default(object)
		object.GetObjectKind().SetGroupVersionKind(*kind)
		read.Object, err = json.Marshal(object)
	}
	if err != nil {
		read.ObjectError = err.Error()
	}
	return read
}
